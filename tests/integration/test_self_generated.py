"""`eetrain generate --out`: what the model writes becomes rows that `fit` trains its exits on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_checkpoint import VOCABULARY, small_tokenizer, write_checkpoint

from eetrain.checkpoints import open_model
from eetrain.checkpoints.export import export_run
from eetrain.cli import main
from eetrain.commands.decoding import Decoder
from eetrain.commands.generate import generate
from eetrain.data.tokenization import TextEncoder
from eetrain.decoding import parse_policy
from eetrain.errors import ConfigError, DataError
from eetrain.evaluation.batches import generate_options
from eetrain.exits import MultiExitModel

PROMPTS = ["one", "two three first second", "third", "one", "second two"]
DIFFERENT = [PROMPTS[place] for place in (0, 1, 2, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "exits"))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return str(file)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def shown(capsys: pytest.CaptureFixture[str], *args: Any, **settings: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert generate(*args, json=True, **settings) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_rows_are_what_generate_shows(
    folder: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    settings: dict[str, Any] = {"policy": "always:2", "max_new_tokens": 9}
    said = shown(capsys, folder, prompts_file=prompts, out=str(out), batch_size=3, **settings)
    wanted = shown(capsys, folder, prompt=DIFFERENT, **settings)
    assert [(row["prompt"], row["response"]) for row in rows_of(out)] == [
        (row["prompt"], row["text"]) for row in wanted["generations"]
    ]
    ends = [bool(row["tokens"]) and row["tokens"][-1]["id"] == 2 for row in wanted["generations"]]
    assert [row["finished"] for row in rows_of(out)] == ends
    assert (said["out"], said["texts"], said["resumed_at"], said["mean_depth"]) == (str(out), 4, 0, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "rows.jsonl"]


def test_a_text_that_ended_is_told_from_one_that_was_cut(
    folder: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shown(capsys, folder, prompt=DIFFERENT, max_new_tokens=6)["generations"]
    tokens = [[token["id"] for token in row["tokens"]] for row in rows]
    stop = tokens[0][2]
    model = open_model(folder)
    model.causal_lm.generation_config.eos_token_id = stop
    encoder = TextEncoder(small_tokenizer(), VOCABULARY)
    decoder = Decoder(model, encoder, parse_policy("never"), generate_options(model, encoder, 6), 2, None, 0)
    found = [row for batch, _ in decoder.batches(DIFFERENT) for row in batch]
    assert [decoder.ended(row) for row in found] == [stop in ids for ids in tokens]
    assert decoder.ended(found[0])


def test_records_and_a_template(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, out = tmp_path / "records.csv", tmp_path / "rows.jsonl"
    records.write_text("mr,ref\none,a\ntwo,b\nthird,c\n")
    settings: dict[str, Any] = {"prompts_file": str(records), "max_new_tokens": 2}
    assert generate(folder, template=r"{mr}\n=> ", limit=2, out=str(out), **settings) == 0
    assert capsys.readouterr().out == f"2 texts in {out}\n"
    assert [row["prompt"] for row in rows_of(out)] == ["one\n=> ", "two\n=> "]
    with pytest.raises(DataError, match="there is no field 'prompt'; the row has 'mr', 'ref'"):
        generate(folder, **settings)


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    decode, seen = Decoder._batch, []

    def counted(self: Decoder, *args: Any) -> Any:
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(1)
        return decode(self, *args)

    monkeypatch.setattr(Decoder, "_batch", counted)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_command_that_was_stopped_goes_on_and_the_file_is_the_same(
    folder: str,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    do_sample: bool,
) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    settings: dict[str, Any] = {
        "prompts_file": prompts,
        "max_new_tokens": 7,
        "batch_size": 2,
        "do_sample": do_sample,
        "seed": 3,
    }
    assert generate(folder, out=str(whole), **settings) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            generate(folder, out=str(resumed), **settings)
    partial = tmp_path / "resumed.jsonl.partial"
    assert not resumed.exists()
    with open(partial, "a", encoding="utf-8") as file:
        # One more row of the next batch, and half of another.
        file.write('{"prompt": "not", "response": "kept", "finished": true}\n{"prompt": "to')
    said = shown(capsys, folder, out=str(resumed), **settings)
    assert said["resumed_at"] == 2
    assert resumed.read_bytes() == whole.read_bytes()
    assert len(rows_of(whole)) == (5 if do_sample else 4)
    assert not partial.exists()


def test_nothing_is_decoded_twice_if_only_the_last_step_was_missing(
    folder: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "rows.jsonl", {"prompts_file": prompts, "max_new_tokens": 2, "batch_size": 3}
    with monkeypatch.context() as patch:
        patch.setattr(
            "eetrain.commands.self_generated.os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            generate(folder, out=str(out), **settings)  # type: ignore[arg-type]
    stop_after(monkeypatch, 0)
    said = shown(capsys, folder, out=str(out), **settings)
    assert (said["resumed_at"], said["tokens_per_second"], len(rows_of(out))) == (4, None, 4)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"policy": "always:1"}, "policy"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"prompts_file": None, "prompt": "other"}, "prompts"),
        ({"seed": 1, "batch_size": 1}, "batch_size, seed"),
    ],
)
def test_it_does_not_go_on_with_other_settings(
    folder: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], differs: str
) -> None:
    settings = {"prompts_file": prompts, "max_new_tokens": 2, "batch_size": 2, "out": str(tmp_path / "rows.jsonl")}
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            generate(folder, **settings)  # type: ignore[arg-type]
    before = (tmp_path / "rows.jsonl.partial").read_bytes()
    with pytest.raises(ConfigError, match=rf"was begun with other settings \({differs}\)\. HINT: Give the command"):
        generate(folder, **{**settings, **changes})
    assert (tmp_path / "rows.jsonl.partial").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "a", "out": "rows.csv"}, r"out='rows.csv' gets one JSON object a line\. HINT: Let its name end"),
        ({"prompt": "a", "out": "there.jsonl"}, r"out='there.jsonl' exists\. HINT: Set --out to another path"),
        ({"prompt": "a", "out": "no/rows.jsonl"}, r"'no/rows.jsonl' cannot be written: No such file or directory"),
        ({"prompt": "a", "out": "rows.jsonl", "html": "a.html"}, "html shows texts and out keeps them for training"),
        ({"prompt": "a", "limit": 1}, r"template and limit are of a file, and there is none"),
        ({"prompts_file": "lines.txt", "template": "{a}"}, r"template='\{a\}' fills in fields, and lines.txt has none"),
        ({"prompts_file": "lines.txt", "limit": 0}, "limit=0, must be at least 1"),
    ],
)
def test_refused(
    settings: dict[str, Any], message: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").write_text("")
    Path("lines.txt").write_text("one\n")
    with pytest.raises(ConfigError, match=message):
        generate(folder, **settings)


def test_exits_are_trained_on_what_the_model_wrote(
    folder: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The round trip on the command line, with the self-supervised overlay."""
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    flags = ["--prompts_file", prompts, "--policy", "never", "--max_new_tokens", "12", "--out", str(rows)]
    assert main(["generate", folder, *flags]) == 0
    template = {"prompt": "{prompt}", "response": "{response}"}
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"backbone": {"path": folder}, "exits": {"layers": [1, 3], "head": "mlp"}},
                "data": {
                    "tokenizer": folder,
                    "train": str(rows),
                    "validation": str(rows),
                    "batch_size": 2,
                    "template": {"class_path": "eetrain.data.PromptResponse", "init_args": template},
                },
                "trainer": {"accelerator": "cpu", "max_steps": 30, "logger": False, "enable_progress_bar": False},
            }
        )
    )
    overlay = Path(__file__).parents[2] / "configs" / "objective" / "self_distillation.yaml"
    settings = ["--run", str(run), "--model.optimizer.lr", "0.01", "--trainer.check_val_every_n_epoch", "1"]
    assert main(["fit", "-c", str(config), "-c", str(overlay), *settings]) == 0
    export_run(run, tmp_path / "trained")
    model, before = open_model(tmp_path / "trained"), open_model(folder)
    pairs = zip(model.backbone.named_parameters(), before.backbone.named_parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)
    fresh = MultiExitModel(before.backbone, model.config)
    for layer in model.exit_layers:
        assert divergence(model, layer, rows_of(rows)) < 0.5 * divergence(fresh, layer, rows_of(rows))


@torch.no_grad()
def divergence(model: MultiExitModel, layer: int, rows: list[dict[str, Any]]) -> float:
    """Mean ``KL(full depth || exit)`` over the tokens that were written, and the end where they are scored."""
    values, tokenizer = [], small_tokenizer()
    for row in rows:
        prompt, response = ([*tokenizer(row[part])["input_ids"]] for part in ("prompt", "response"))
        output = model(torch.tensor([[1, *prompt, *response]]))
        target = model.logits(output)[0, len(prompt) :].log_softmax(-1)
        found = model.logits(output, layer)[0, len(prompt) :].log_softmax(-1)
        values.append((target.exp() * (target - found)).sum(-1))
    return float(torch.cat(values).mean())
