import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import small_tokenizer, write_checkpoint, write_plain

from eetrain.checkpoints import open_model
from eetrain.cli import main
from eetrain.commands.generate import generate
from eetrain.commands.opening import find_device, unescaped
from eetrain.decoding import generation
from eetrain.errors import ConfigError, DataError
from eetrain.viewing import decoded_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "exits", exit_policy="always:2"))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_plain(tmp_path_factory.mktemp("models") / "plain"))


def run_json(capsys: pytest.CaptureFixture[str], *args: Any, **settings: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert generate(*args, json=True, **settings) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1, "one JSON object and nothing else"
    found: dict[str, Any] = json.loads(captured.out)
    return found


def test_json_holds_text_tokens_and_depths_of_generate(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, folder, prompt=r"one\ntwo", policy="threshold:0.02", max_new_tokens=9)
    model, tokenizer = open_model(folder), small_tokenizer()
    ids = torch.tensor([[1, *tokenizer("one\ntwo")["input_ids"]]])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        exit_policy="threshold:0.02",
        max_new_tokens=9,
        return_dict_in_generate=True,
    )
    new = output.sequences[0, ids.shape[1] :].tolist()
    [row] = found["generations"]
    assert [token["id"] for token in row["tokens"]] == new
    assert row["depths"] == output.exit_trace[0].tolist()
    assert row["text"] == decoded_text(tokenizer, new) == "".join(token["text"] for token in row["tokens"])
    assert row["prompt"] == "one\ntwo"
    assert found["mean_depth"] == row["mean_depth"] == pytest.approx(sum(row["depths"]) / len(row["depths"]))
    assert found["seconds"] > 0
    assert (found["policy"], found["num_blocks"]) == ("threshold:0.02", 4)


def test_prompts_of_unequal_length_together_equal_each_alone(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["one", "two three first second", "third"]
    together = run_json(capsys, folder, prompt=prompts, policy="never", max_new_tokens=6, batch_size=2)
    for prompt, row in zip(prompts, together["generations"], strict=True):
        [alone] = run_json(capsys, folder, prompt=prompt, policy="never", max_new_tokens=6)["generations"]
        assert row == alone


def test_the_checkpoints_own_policy_is_the_default(
    folder: str, plain_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, folder, prompt="one", max_new_tokens=3)
    assert found["policy"] == "always:2"
    assert found["generations"][0]["depths"] == [2, 2, 2]
    plain = run_json(capsys, plain_folder, prompt="one", max_new_tokens=3)
    assert plain["policy"] == "never"
    assert plain["generations"][0]["depths"] == [4, 4, 4]


def test_sampling_is_seeded(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"prompt": "one", "do_sample": True, "max_new_tokens": 12, "policy": "never"}
    texts = [run_json(capsys, folder, seed=seed, **settings)["generations"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    near_greedy = run_json(capsys, folder, temperature=1e-4, **settings)["generations"]
    assert near_greedy == run_json(capsys, folder, **{**settings, "do_sample": False})["generations"]


def test_a_pipe_gets_plain_text_and_a_terminal_colours(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["one", "two"]
    rows = run_json(capsys, folder, prompt=prompts, max_new_tokens=5)["generations"]
    assert generate(folder, prompt=prompts, max_new_tokens=5) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(row["text"] + "\n" for row in rows)
    assert captured.err == "", "no progress bar where nobody looks"
    assert generate(folder, prompt="one", max_new_tokens=5, color="always") == 0
    shown = capsys.readouterr().out
    assert "\x1b[" in shown
    assert " mean 2.00 of 4  5 tokens," in re.sub(r"\x1b\[[\d;]*m", "", shown)


def test_a_terminal_gets_tokens_as_they_come(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt is streamed: the same text as when it is shown at the end, but earlier."""
    arrived: list[str] = []
    decode = generation.decode

    def watched(*arguments: Any) -> Any:
        result = decode(*arguments)
        arrived.append(capsys.readouterr().out)
        return result

    monkeypatch.setattr(generation, "decode", watched)
    for policy in ("never", "always:2"):
        assert generate(folder, prompt="one", max_new_tokens=5, color="always", policy=policy) == 0
        rest = capsys.readouterr().out
        streamed, arrived[:] = arrived[0], []
        assert generate(folder, prompt=["one", "one"], max_new_tokens=5, color="always", policy=policy) == 0
        whole = capsys.readouterr().out
        assert arrived == [""], "several prompts are shown at the end"
        arrived.clear()
        assert "\x1b[38" in streamed
        plain = [re.sub(r"\x1b\[[\d;]*m", "", text) for text in (streamed, whole)]
        assert plain[0]
        assert plain[1].count(plain[0] + "\n") == 2
        assert "tokens/s" in rest


def test_html_file(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert generate(folder, prompt="<one>", max_new_tokens=3, html=str(page)) == 0
    text = page.read_text(encoding="utf-8")
    assert "&lt;one&gt;" in text
    assert text.count('title="depth 2 of 4, token ') == 3
    with pytest.raises(ConfigError, match=r"cannot be written: No such file or directory\. HINT: Set --html"):
        generate(folder, prompt="one", max_new_tokens=1, html=str(tmp_path / "missing" / "page.html"))


def test_prompts_from_files(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("one\n\ntwo\n")
    records.write_text('{"prompt": "a\\nb"}\n')
    for path, wanted in ((lines, ["first", "one", "two"]), (records, ["first", "a\nb"])):
        found = run_json(capsys, folder, prompt="first", prompts_file=str(path), max_new_tokens=1)
        assert [row["prompt"] for row in found["generations"]] == wanted
    lines.write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        generate(folder, prompts_file=str(lines))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"There is no prompt\. HINT: Set --prompt"),
        ({"prompt": "a", "temperature": 0.5}, r"have no effect on greedy decoding\. HINT: Add --do_sample true"),
        ({"prompt": "a", "temperature": 0.0, "do_sample": True}, r"temperature=0\.0, top_p=1\.0: the first must be"),
        ({"prompt": "a", "max_new_tokens": 0}, r"max_new_tokens=0, must be at least 1"),
        ({"prompt": "a", "policy": "always:3"}, r"the model has no exit after block 3"),
        ({"prompt": "a", "device": "nowhere"}, r"device='nowhere': .* HINT: Set --device to auto, cpu or cuda"),
        ({"prompt": "", "bos": False}, r"The prompt '' has no tokens"),
    ],
)
def test_refused(settings: dict[str, Any], message: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(folder, **settings)


def test_escapes_of_the_command_line() -> None:
    assert unescaped(r"a\nb\tc\\nd\e") == "a\nb\tc" + r"\nd\e"


def test_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_from_the_command_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", '["one", "two: {x}"]', "--policy", "always:1", "--max_new_tokens", "2", "--json", "true"]
    assert main(["generate", folder, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in found["generations"]] == ["one", "two: {x}"]
    assert found["mean_depth"] == 1
    assert main(["generate", folder]) == 2
    assert "HINT: Set --prompt" in capsys.readouterr().err


def test_speculation_tells_who_drafted(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"prompt": ["one", "two two"], "max_new_tokens": 9, "json": True}
    assert generate(folder, policy="never", **settings) == 0
    plain = json.loads(capsys.readouterr().out)
    assert generate(folder, policy="speculative:exit=2,draft=3", **settings) == 0
    found = json.loads(capsys.readouterr().out)
    for own, other in zip(found["generations"], plain["generations"], strict=True):
        assert own["tokens"] == other["tokens"]
        assert own["depths"] == other["depths"], "every token has run all blocks"
        assert set(own["drafted_by"]) <= {0, 2}
        assert not any(other["drafted_by"])
    assert any(any(own["drafted_by"]) for own in found["generations"])
