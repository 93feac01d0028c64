import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import write_checkpoint, write_plain

from eetrain.cli import main
from eetrain.commands.evaluate import evaluate
from eetrain.commands.policies import split_policies
from eetrain.data import PromptResponse
from eetrain.errors import ConfigError

ROWS = "question,answer\none,first a\ntwo,second\none,first b\nthree,third\n"
FAST: dict[str, Any] = {"max_new_tokens": 4, "repeats": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "exits"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return str(path)


def test_command_line_to_files(folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--data", data, "--prompt", r"{question}\n=> ", "--response", "{answer}"]
    flags += ["--policies", "always:2,threshold:0.02,measure=margin", "--limit", "2", "--max_new_tokens", "4"]
    assert main(["evaluate", folder, *flags, "--repeats", "1", "--out", str(out), "--json", "true"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1, "one JSON object and nothing else"
    found = json.loads(captured.out)
    assert sorted(path.name for path in out.iterdir()) == [
        "frontier.png",
        "outputs.jsonl",
        "results.csv",
        "results.json",
    ]
    assert found.pop("files") == [
        str(out / name) for name in ("results.json", "results.csv", "outputs.jsonl", "frontier.png")
    ]
    assert found == json.loads((out / "results.json").read_text())
    assert [row["policy"] for row in found["policies"]] == ["never", "always:2", "threshold:0.02,measure=margin"]
    assert found["settings"]["prompts"] == 2
    assert found["settings"]["template"] == {
        "class_path": "eetrain.data.templates.PromptResponse",
        "init_args": {
            "prompt": "{question}\n=> ",
            "response": "{answer}",
            "bos": None,
            "eos": True,
            "train_on_prompt": False,
        },
    }
    first = json.loads((out / "outputs.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "one\n=> "
    assert first["references"] == ["first a", "first b"]


def test_table_in_a_pipe(folder: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    template = PromptResponse("{question}:", "{answer}")
    assert evaluate(folder, data, template=template, policies=["always:1"], **FAST) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].startswith("3 prompts, 4 blocks, ")
    assert lines[0].endswith("; ± is half of the 95 % interval over prompts")
    assert lines[1].split()[:7] == ["policy", "BLEU", "ROUGE-L", "exact", "agrees", "same", "depth"]
    never, always = lines[2].split(), lines[3].split()
    assert (never[0], never[4:7], never[-1]) == ("never", ["1", "1", "4"], "1")
    assert (always[0], always[6]) == ("always:1", "1")
    assert lines[4] == "difference to never"
    assert lines[5].split() == ["policy", "BLEU", "ROUGE-L", "exact"]
    assert re.fullmatch(r"always:1 +[+-][\d.]+±[\d.]+ +[+-][\d.]+±[\d.]+ +\+0\.00±0\.00", lines[6])
    assert [line.split()[0] for line in lines[8:]] == ["exit", "1", "2", "full"]
    assert all(line == line.rstrip() for line in lines)


def test_one_prompt_says_that_it_has_no_intervals(folder: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    ask: dict[str, Any] = {"prompt": "{question}", "response": "{answer}", "policies": "always:1", "limit": 1}
    assert evaluate(folder, data, **ask, **FAST) == 0
    table = capsys.readouterr().out
    assert "; one prompt only, so no intervals" in table
    assert "±" not in table
    assert evaluate(folder, data, **ask, **FAST, json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["intervals"] is None
    assert found["policies"][1]["rouge_l_delta"] is not None
    assert found["policies"][1]["rouge_l_delta_low"] is None


def test_likelihood_of_references_on_request(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", data, "--prompt", r"{question}\n=> ", "--response", "{answer}", "--policies", "always:2"]
    flags += ["--max_new_tokens", "2", "--repeats", "0", "--likelihood", "--out", str(tmp_path / "out")]
    assert main(["evaluate", folder, *flags]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["policy", "BLEU", "ROUGE-L", "exact", "NLL"]
    first = json.loads((tmp_path / "out" / "outputs.jsonl").read_text().splitlines()[0])
    assert set(first["nll_sums"]) == {"never", "always:2"}
    assert first["depth_sums"]["always:2"] == 2 * first["tokens"]["always:2"]


def test_plain_text_has_agreement_and_likelihood_instead_of_bleu(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "first second third"}\n{"text": "one two three one two"}\n')
    out = tmp_path / "out"
    assert evaluate(folder, str(path), prompt_tokens=4, json=True, out=str(out), policies="always:1", **FAST) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["bleu"] for row in found["policies"]] == [None, None]
    assert [row["reference_tokens"] for row in found["policies"]] == [8, 8]
    assert found["policies"][0]["reference_nll"] == pytest.approx(found["exits"][-1]["reference_nll"], rel=1e-5)
    assert found["policies"][1]["reference_nll"] == pytest.approx(found["exits"][0]["reference_nll"], rel=1e-5)
    assert found["settings"]["likelihood"] is True
    assert found["policies"][0]["full_depth_agreement"] == 1
    assert found["policies"][1]["full_depth_agreement"] < 1
    assert found["exits"][0]["reference_tokens"] == 8
    assert (out / "frontier.png").stat().st_size > 5000


def test_default_policies_are_every_exit_and_two_thresholds(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask: dict[str, Any] = {"prompt": "{question}", "response": "{answer}", "json": True, "limit": 1}
    ask |= {"max_new_tokens": 2, "repeats": 0}
    assert evaluate(folder, data, **ask) == 0
    names = [row["policy"] for row in json.loads(capsys.readouterr().out)["policies"]]
    assert names == ["never", "always:1", "always:2", "threshold:0.7", "threshold:0.9"]
    assert evaluate(str(write_plain(tmp_path / "plain")), data, **ask) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in found["policies"]] == ["never"]
    assert [row["exit"] for row in found["exits"]] == ["full"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, []),
        ("never", ["never"]),
        ("never,always:6, threshold:0.9", ["never", "always:6", "threshold:0.9"]),
        ("threshold:0.9,measure=margin,cap=4,never", ["threshold:0.9,measure=margin,cap=4", "never"]),
        ("skipdecode:max=9,min=4,always:3", ["skipdecode:max=9,min=4", "always:3"]),
        (["never", "threshold:0.9,measure=margin"], ["never", "threshold:0.9,measure=margin"]),
    ],
)
def test_policies_of_one_string(given: str | list[str] | None, wanted: list[str]) -> None:
    assert split_policies(given) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{question}"}, r"--response is missing\. HINT: Give both"),
        ({"response": "{answer}"}, r"--prompt is missing"),
        ({}, r"The template is plain text, which has no prompts"),
        (
            {"prompt": "{q}", "response": "{a}", "template": PromptResponse("{q}", "{a}")},
            r"Both a template and --prompt",
        ),
        ({"prompt": "{question}", "response": "{answer}", "limit": 0}, r"limit=0, must be at least 1"),
        (
            {"prompt": "{question}", "response": "{answer}", "policies": "measure=max"},
            r"'measure=max' is none of never",
        ),
    ],
)
def test_refused(settings: dict[str, Any], message: str, folder: str, data: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(folder, data, **settings)


def test_data_must_be_named(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"There is no data to evaluate on\. HINT: Set --data FILE\."):
        evaluate(folder)


def test_a_speculative_policy_says_what_its_drafts_came_to(
    folder: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"data": data, "prompt": "{question}\n", "response": "{answer}", "batch_size": 2}
    policies = "never,speculative:exit=2,draft=3,speculative:exit=2,stop=thompson"
    assert evaluate(folder, policies=policies, json=True, **settings, **FAST) == 0
    plain, fixed, thompson = json.loads(capsys.readouterr().out)["policies"]
    assert [row["policy"] for row in (fixed, thompson)] == policies.removeprefix("never,").replace(
        ",spec", "|spec"
    ).split("|")
    assert plain["acceptance"] is plain["tokens_per_round"] is None
    for row in (fixed, thompson):
        assert row["same_as_never"] == 1.0
        assert row["mean_depth"] == plain["mean_depth"] == row["depth_p10"]
        assert 0 <= row["acceptance"] <= 1 <= row["tokens_per_round"] <= 5
    assert fixed["blocks_per_token"] >= plain["blocks_per_token"]
    assert evaluate(folder, policies=policies, **settings, **FAST) == 0
    assert "tokens/round" in capsys.readouterr().out
