import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_checkpoint import VOCABULARY, small_tokenizer, write_checkpoint, write_plain

from eetrain.cli import main
from eetrain.commands.bench import bench
from eetrain.errors import ConfigError, DataError
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.testing.runs import write_run
from eetrain.testing.tiny import tiny_model

ROWS = "question,answer\none two,first\ntwo,second\nthree,third\n"
FAST: dict[str, Any] = {"baselines": "dynamic,cut", "new_tokens": 4, "repeats": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "exits"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return str(path)


def test_command_line_to_files(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, costs = tmp_path / "out", tmp_path / "deeper" / "costs.yaml"
    flags = ["--policies", "never,threshold:0.02,measure=margin", "--batch_sizes", "2", "--prompt_lengths", "5,9"]
    flags += ["--new_tokens", "4", "--repeats", "3", "--baselines", "dynamic,cut", "--costs", str(costs)]
    threads = torch.get_num_threads()
    assert main(["bench", folder, *flags, "--threads", "1", "--out", str(out), "--json"]) == 0
    assert torch.get_num_threads() == threads, "left as it was"
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1, "one JSON object and nothing else"
    found = json.loads(captured.out)
    assert found.pop("files") == [str(out / "bench.json"), str(out / "bench.csv"), str(costs)]
    assert found == json.loads((out / "bench.json").read_text())
    policies = ["never", "threshold:0.02,measure=margin", "always:1", "always:2"]
    assert found["settings"] == {
        "model": folder,
        "data": [],
        "policies": policies,
        "new_tokens": 4,
        "repeats": 3,
        "baselines": ["dynamic", "cut"],
    }
    assert (found["environment"]["threads"], found["environment"]["dtype"]) == (1, "float32")
    assert (found["num_blocks"], found["exit_layers"]) == (4, [1, 2])
    assert [entry["prompt_length"] for entry in found["measurements"]] == [5, 9]
    for entry in found["measurements"]:
        rows = {row["candidate"]: row for row in entry["candidates"]}
        assert list(rows)[:5] == ["dynamic", *policies]
        assert rows["never"]["same_tokens"] is True
        assert {name: rows[name]["blocks_per_token"] for name in ("dynamic", "never", "always:1", "cut:2")} == {
            "dynamic": 4,
            "never": 4,
            "always:1": 1,
            "cut:2": 2,
        }
        assert entry["order"] == list(rows) * 3
        assert [len(times) for times in entry["rounds"].values()] == [3] * len(rows)
        profile = [rows["never"][name] for name in ("blocks_ms", "heads_ms", "harvest_ms", "rest_ms")]
        assert sum(profile) == pytest.approx(rows["never"]["profile_ms"])
    with (out / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["candidate"] for line in lines] == [
        row["candidate"] for entry in found["measurements"] for row in entry["candidates"]
    ]
    assert float(lines[1]["step_ms"]) == found["measurements"][0]["candidates"][1]["step_ms"]
    first = found["measurements"][0]["rounds"]
    written = yaml.safe_load(costs.read_text())["model"]["objective"]["init_args"]["exit_costs"]
    assert written == {
        layer: round(
            sorted(
                own["decode"] / full["decode"]
                for own, full in zip(first[f"always:{layer}"], first["never"], strict=True)
            )[1],
            4,
        )
        for layer in (1, 2)
    }


def test_costs_are_a_further_configuration_for_gates(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = tmp_path / "costs.yaml"
    assert bench(folder, policies="never", costs=str(costs), **{**FAST, "baselines": []}) == 0
    comment = costs.read_text().splitlines()
    assert comment[0] == "# What decoding up to each exit costs, the full depth being 1."
    assert comment[1].endswith("float32, batch 1, prompt 32.")
    overlay = yaml.safe_load(costs.read_text())
    assert overlay["model"]["objective"]["init_args"]["exit_costs"].keys() == {1, 2}
    # Noise on a busy machine can turn the order of two exits round; known numbers cannot.
    overlay["model"]["objective"]["init_args"]["exit_costs"] = {1: 0.4, 2: 0.6}
    costs.write_text(yaml.safe_dump(overlay))
    gating = Path(__file__).parents[2] / "configs" / "objective" / "joint_gating.yaml"
    capsys.readouterr()
    together = ["fit", "-c", str(write_run(tmp_path)), "-c", str(gating), "-c", str(costs)]
    assert main([*together, "--print_config"]) == 0
    objective = yaml.safe_load(capsys.readouterr().out)["model"]["objective"]
    assert objective["class_path"] == "eetrain.objectives.JointGating"
    assert {int(layer): cost for layer, cost in objective["init_args"]["exit_costs"].items()} == {1: 0.4, 2: 0.6}
    assert objective["init_args"]["phase_steps"] == 200, "the rest stays"
    steps = ["--model.objective.warmup_steps=0", "--model.objective.phase_steps=1"]
    assert main([*together, *steps, "--trainer.max_steps=2"]) == 0
    assert main([*together, *steps, "--model.exits.layers=[1,3]", "--run", str(tmp_path / "other")]) == 2
    assert "exit_costs names layers [1, 2]" in capsys.readouterr().err


def test_table_in_a_pipe(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, batch_sizes=[2], prompt_lengths=[3], **FAST) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].startswith("batch 2, prompt 3, 4 new tokens, 4 blocks, ")
    assert lines[0].endswith(" threads, float32, median of 1")
    assert lines[1].split()[:5] == ["candidate", "depth", "blocks/token", "same", "tokens"]
    assert [line.split()[:4] for line in lines[2:8]] == [
        ["dynamic", "4", "4", "yes"],
        ["never", "4", "4", "yes"],
        ["always:1", "1", "1", "no"],
        ["always:2", "2", "2", "no"],
        ["cut:1", "1", "1", "no"],
        ["cut:2", "2", "2", "no"],
    ]
    assert lines[8] == "where a step goes, in one run with hooks"
    assert lines[9].split() == ["candidate", "step", "ms", "blocks", "heads", "harvest", "rest"]
    assert [line.split()[0] for line in lines[10:]] == ["never", "always:1", "always:2"]


def test_a_baseline_that_cannot_run_is_named(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.LlamaForCausalLM.get_compiled_call", lambda self, config: self.__call__)
    assert bench(folder, policies="never", batch_sizes="1", **{**FAST, "baselines": "static"}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "not measured"
    assert lines[-1].split(maxsplit=1) == ["static", "transformers does not compile LlamaForCausalLM"]


def test_real_prompts(folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = {"prompt": "{question}", "response": "{answer}", "policies": "never", "json": True, **FAST}
    assert bench(folder, data=data, batch_sizes="1,2", limit=3, **ask) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = [{key: entry[key] for key in ("batch_size", "batches")} for entry in found["measurements"]]
    assert sizes == [{"batch_size": 1, "batches": 3}, {"batch_size": 2, "batches": 1}]
    assert all(entry["candidates"][1]["same_tokens"] for entry in found["measurements"])
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "first second third"}\n{"text": "one two three one two"}\n')
    assert (
        bench(folder, data=str(text), batch_sizes=[2], prompt_lengths="3,5", policies="never", json=True, **FAST) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [entry["prompt_length"] for entry in found["measurements"]] == [3, 5]
    with pytest.raises(DataError, match=r"3 prompts, too few for a batch of 4"):
        bench(folder, data=data, batch_sizes=[4], **ask)


def test_a_plain_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = str(write_plain(tmp_path / "plain"))
    assert bench(plain, batch_sizes=[1], json=True, **FAST) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["candidate"] for row in found["measurements"][0]["candidates"]] == ["dynamic", "never"]
    assert bench(plain, policies="skipdecode:max=3,min=2", batch_sizes=[1], json=True, **FAST) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["measurements"][0]["candidates"]
    assert rows[1]["candidate"] == "skipdecode:max=3,min=2"
    assert 2 <= rows[1]["blocks_per_token"] <= 3
    with pytest.raises(ConfigError, match=r"--costs is set, but the model has no exits"):
        bench(plain, costs=str(tmp_path / "costs.yaml"), **FAST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_sizes": "1,x"},
            r"batch_sizes='1,x' is no list of positive numbers\. HINT: For example --batch_sizes 1",
        ),
        ({"batch_sizes": []}, r"batch_sizes=\[\] is no list"),
        ({"prompt_lengths": "0"}, r"prompt_lengths='0' is no list"),
        ({"baselines": "dynamic,fast"}, r"baselines holds 'fast', which is not known"),
        ({"policies": "always:3"}, r"no exit after block 3"),
        ({"threads": 0}, r"threads=0, must be at least 1"),
        ({"prompt_lengths": "61"}, r"the model has 64 positions"),
        ({"limit": 3}, r"--limit is set, but there is no data"),
        ({"prompt": "{question}"}, r"--prompt is set, but there is no data"),
        ({"data": "x.csv", "limit": 0}, r"limit=0, must be at least 1"),
    ],
)
def test_refused(settings: dict[str, Any], message: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(folder, **{**FAST, **settings})


def test_files_that_cannot_be_written(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ask = {"policies": "never", "batch_sizes": [1], **FAST}
    with pytest.raises(ConfigError, match=r"The results cannot be written to .*HINT: Set --out"):
        bench(folder, out=str(tmp_path / "file"), **ask)
    with pytest.raises(ConfigError, match=r"cannot be written: .*HINT: Set --costs to another path"):
        bench(folder, costs=str(tmp_path / "file" / "costs.yaml"), **ask)


def test_the_assistant_as_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = tiny_model("llama", vocab_size=VOCABULARY, dtype=torch.float32)
    model = MultiExitModel(backbone, ExitConfig(layers=[1, 3], head="tied"))
    folder = model.save_pretrained(tmp_path / "tied", tokenizer=small_tokenizer())
    capsys.readouterr()
    ask = {"policies": "never", "batch_sizes": "1,2", "prompt_lengths": "4", **FAST, "baselines": "assistant"}
    assert bench(str(folder), json=True, **ask) == 0
    one, two = json.loads(capsys.readouterr().out)["measurements"]
    rows = {row["candidate"]: row for row in one["candidates"]}
    assert list(rows) == ["assistant:1", "assistant:3", "never"]
    assert all(row["same_tokens"] for row in rows.values())
    assert rows["never"]["assistant"] in ("assistant:1", "assistant:3")
    assert two["unavailable"] == dict.fromkeys(
        ("assistant:1", "assistant:3"), "transformers' assisted generation decodes one row at a time"
    )
    assert bench(str(folder), **ask) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[1].split()[-3:] == ["x", "assistant", "which"]
