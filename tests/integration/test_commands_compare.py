"""`eetrain evaluate` on two checkpoints, then `eetrain compare` on what it wrote."""

import json
from pathlib import Path

import pytest
import torch
from small_checkpoint import VOCABULARY, small_tokenizer, write_checkpoint

from eetrain.cli import main, with_list
from eetrain.commands.compare import compare
from eetrain.commands.generate import generate
from eetrain.commands.numbers import with_intervals
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.testing.tiny import tiny_model

ROWS = "question,answer\none,first a\ntwo,second\none,first b\nthree,third\n"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Reports of two checkpoints, and one of times only, on fewer prompts."""
    place = tmp_path_factory.mktemp("compare")
    (place / "rows.csv").write_text(ROWS)
    write_checkpoint(place / "first")
    other = MultiExitModel(tiny_model("llama", seed=1, vocab_size=VOCABULARY, dtype=torch.float32), ExitConfig([1, 2]))
    other.save_pretrained(place / "second", tokenizer=small_tokenizer())
    data = ["--data", str(place / "rows.csv"), "--prompt", "{question}:", "--response", "{answer}"]
    shared = [*data, "--max_new_tokens", "4", "--policies"]
    for model, out, policies, rest in (
        ("first", "one", "always:2,threshold:0.02,repair=propagate", ["--repeats", "0", "--likelihood"]),
        ("second", "two", "always:2", ["--repeats", "0", "--likelihood"]),
        ("second", "times", "always:2", ["--repeats", "1", "--limit", "1"]),
    ):
        assert main(["evaluate", str(place / model), *shared, policies, *rest, "--out", str(place / out)]) == 0
    return {name: str(place / name) for name in ("one", "two", "times")}


def test_command_line_to_files(reports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"a={reports['one']}", f"b={reports['two']}", f"b={reports['times']}"]
    flags = ["--baseline", "b:always:2", "--metric=nll", "--out", str(tmp_path / "out"), "--json"]
    assert main(["compare", *given, *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1, "one JSON object and nothing else"
    found = json.loads(captured.out)
    assert found.pop("files") == [
        str(tmp_path / "out" / name) for name in ("comparison.json", "comparison.csv", "frontier.png")
    ]
    assert found == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (found["metric"], found["baseline"], found["prompts"]) == ("nll", "b:always:2", 3)
    assert [(row["model"], row["policy"]) for row in found["rows"]] == [
        ("a", "never"),
        ("a", "always:2"),
        ("a", "threshold:0.02,repair=propagate"),
        ("b", "never"),
        ("b", "always:2"),
    ]
    assert [row["speedup"] is None for row in found["rows"]] == [True, True, True, False, False]
    stored = json.loads((Path(reports["one"]) / "results.json").read_text())["policies"]
    assert [row["quality"] for row in found["rows"][:3]] == [row["reference_nll"] for row in stored]
    assert [row["mean_depth"] for row in found["rows"][:3]] == [row["mean_depth"] for row in stored]
    assert [own["folder"] for own in found["reports"]] == [reports["one"], reports["two"], reports["times"]]


def test_table(reports: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare([f"a={reports['one']}", f"b={reports['two']}"], metric="rouge_l") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 prompts, ROUGE-L, differences to a:never; ± is half of the 95 % interval over prompts"
    assert lines[1].split() == ["model", "policy", "ROUGE-L", "difference", "%", "worse", "depth", "blocks/token"]
    assert lines[2].split()[:2] == ["a", "never"]
    assert lines[2].split()[3:] == ["baseline", "-", "-", "4", "4"]
    assert len(lines) == 2 + 5
    assert compare([f"a={reports['one']}"], metric="nll") == 0
    assert "nats per reference token (less is better)" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/a"], r"error: 'runs/a' is not NAME=FOLDER."),
        (["=runs/a"], r"error: '=runs/a' is not NAME=FOLDER."),
        (["a:b=runs/a"], r"error: The name 'a:b' has a colon"),
        (["a=nowhere"], r"error: a: 'nowhere' is no report: it has no results.json"),
        ([], r"error: the following arguments are required: reports"),
        (["a=x", "--metrics", "bleu"], "error: there is no setting 'metrics'.\nHINT: Did you mean metric?"),
    ],
)
def test_bad_use(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_words_become_a_list_wherever_flags_stand() -> None:
    wanted = ['["a=x", "b=y"]', "--metric", "nll", "--json", "true"]
    for given in (
        "a=x b=y --metric nll --json true",
        "--metric nll a=x b=y --json true",
        "--metric=nll --json true a=x b=y",
    ):
        assert with_list(given.split(), compare) == wanted
    assert with_list(["--help"], compare) == ["--help"]
    assert with_list(["model", "--prompt", "x"], generate) == ["model", "--prompt", "x"], "its first setting is no list"


def test_numbers_of_a_column_end_at_the_same_digit() -> None:
    assert with_intervals([(68.4312, 67.2, 69.6), (70.26, 70.1, 70.4), (None, None, None)]) == [
        "68.4±1.2",
        "70.3±0.2",
        None,
    ]
    assert with_intervals([(0.0548, 0.036, 0.0735)]) == ["0.055±0.019"]
    assert with_intervals([(1234.5, 1200.0, 1300.0)]) == ["1234.5±50.0"]
    assert with_intervals([(0.0, 0.0, 0.0), (-1.25, None, None)], signed=True) == ["+0.00±0.00", "-1.25"]
