"""What the command line says: its verbs, and every mistake as one line with a hint."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401 - its log keeps the stderr of the first import, which must not be a test's
import pytest
import yaml

from eetrain.cli import VERBS, main, with_flags
from eetrain.testing.runs import write_run

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAYS = sorted(CONFIGS.rglob("*.yaml"))
OWN_ROOMS = {"debug", "exits", "logger", "objective", "peft", "precision", "strategy"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def error_of(capsys, *arguments):
    """Exit status and what stands on stderr after ``error:`` and ``HINT:``."""
    status = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "HINT: "))]
    assert [line.partition(":")[0] for line in lines] == ["error", "HINT"]
    return status, lines[0].removeprefix("error: "), lines[1].removeprefix("HINT: ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_lists_every_verb(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb:<10}{text}" in out for verb, text in VERBS.items())


def test_an_unknown_verb(capsys):
    assert error_of(capsys, "fitt") == (
        2,
        "there is no verb 'fitt'.",
        f"Did you mean fit? Verbs: {', '.join(VERBS)}.",
    )
    assert error_of(capsys, "zzz")[2] == f"Verbs: {', '.join(VERBS)}."


def test_help_of_a_verb(capsys):
    assert main(["fit", "--help"]) == 0
    out = capsys.readouterr().out
    for key in ("--model.exits.head", "--model.objective", "--data.max_length", "--trainer.max_steps", "--run"):
        assert key in out


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--model.exitz", "3"], "there is no setting 'model.exitz'.", "Did you mean model.exits?"),
        (
            ["--model.exits.layrs", "[3]"],
            "there is no setting 'model.exits.layrs'.",
            "Did you mean model.exits.layers?",
        ),
        (["--trainer.max_stepz=3"], "there is no setting 'trainer.max_stepz'.", "Did you mean trainer.max_steps?"),
        (
            ["--model.objective.weigths", "0.5"],
            "there is no setting 'weigths' of eetrain.objectives.MultiExitCrossEntropy.",
            "Did you mean weights?",
        ),
        (["--model.optimizer.lr", "abc"], "model.optimizer.lr: Expected a float. Got value: abc", "lists the settings"),
        (["--model.exits.head=foo"], "model.exits.head: Expected a value out of 'tied', 'norm'", "lists the settings"),
        (["--model.objective", "Nope"], "Expected a dot import path string: Nope", "such as eetrain.objectives.EETun"),
        (["-c", "nope.yaml"], "nope.yaml", "lists the settings"),
        (["--model.backbone.path=null"], "neither path nor config is set", "Set model.backbone.path"),
        (["--model.optimizer.lr=-1"], "model.optimizer.lr=-1.0 is out of its range", "Rates and steps are positive"),
        (["--model.exits.layers=[9]"], "Exits after blocks [9]: [9] outside 1..4", "Blocks count from 1"),
        (["--model.objective.schedule=linear"], "schedule is 'linear' and schedule_steps is 0.", "set schedule_steps"),
        (["--data.batch_size=0"], "batch_size is 0.", "Set it to 1 or more."),
        (["--data.train=nope.jsonl"], "nope.jsonl", "Give a file"),
        (
            ["--model.objective", "EETuning"],
            "The objective EETuning trains exits of a frozen backbone, but model.tuning=full.",
            "Set model.tuning=frozen",
        ),
    ],
)
def test_bad_use_names_what_was_set_and_what_to_do(base, capsys, arguments, message, hint):
    status, said, hinted = error_of(capsys, "fit", "-c", base, *arguments)
    assert status == 2
    assert message in said
    assert hint in hinted


def test_an_unknown_key_in_a_file(base, tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model:\n  exits:\n    layrs: [1]\n")
    assert error_of(capsys, "fit", "-c", base, "-c", wrong) == (
        2,
        "there is no setting 'model.exits.layrs'.",
        "Did you mean model.exits.layers?",
    )


def test_a_missing_backbone_is_a_failure(base, tmp_path, capsys):
    status, said, hinted = error_of(capsys, "fit", "-c", base, "--model.backbone.path", tmp_path / "gone")
    assert status == 1
    assert str(tmp_path / "gone") in said
    assert "config.json" in hinted


def test_a_checkpoint_that_cannot_be_written_is_a_failure(base, tmp_path, capsys):
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)
    status, said, hinted = error_of(
        capsys, "fit", "-c", base, "--run", tmp_path, "--trainer.max_steps", 1, "--resume", "auto"
    )
    assert status == 1
    assert said.startswith(f"The checkpoint {tmp_path}/checkpoints/last.ckpt could not be written: Is a directory.")
    assert "--resume auto" in hinted


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_checkpoint_that_cannot_be_read_is_a_failure(base, tmp_path, capsys, verb):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK\x03\x04 cut short")
    status, said, hinted = error_of(capsys, verb, "-c", base, "--ckpt_path", broken)
    assert (status, hinted) == (1, "It is cut short or no checkpoint; use an older one of the run.")
    assert said.startswith(f"{broken} cannot be read: ")


def test_a_missing_checkpoint_is_bad_use(base, tmp_path, capsys):
    status, said, _ = error_of(capsys, "fit", "-c", base, "--ckpt_path", tmp_path / "gone.ckpt")
    assert status == 2
    assert "gone.ckpt" in said


def test_settings_of_the_trainer_that_contradict_each_other(base, capsys):
    status, said, _ = error_of(capsys, "fit", "-c", base, "--trainer.gradient_clip_algorithm", "nope")
    assert status == 2
    assert "nope" in said


@pytest.mark.parametrize("setting", ["--trainer.fast_dev_run=true", "--trainer.enable_checkpointing=false"])
def test_a_trial_run_writes_no_checkpoint(base, tmp_path, setting):
    assert main(["fit", "-c", str(base), "--run", str(tmp_path), "--trainer.max_steps=1", setting]) == 0
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_debug_shows_the_traceback(base, monkeypatch):
    from eetrain.errors import ConfigError

    monkeypatch.setenv("EETRAIN_DEBUG", "1")
    with pytest.raises(ConfigError, match=r"no setting 'model\.exitz'"):
        main(["fit", "-c", str(base), "--model.exitz", "3"])


def test_flags_of_other_verbs_need_no_value():
    def command(run: str, json: bool = False, keep: bool = True) -> None: ...

    assert with_flags(["a", "--json"], command) == ["a", "--json", "true"]
    assert with_flags(["--json", "--keep", "x"], command) == ["--json", "true", "--keep", "x"]
    assert with_flags(["--json", "false"], command) == ["--json", "false"]


def test_importing_the_package_is_fast():
    heavy = ("torch", "transformers", "lightning")
    code = f"import sys, eetrain, eetrain.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    import eetrain

    for name in eetrain.__all__:
        assert getattr(eetrain, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = eetrain.Nope


def test_overlays_are_all_here():
    names = [str(path.relative_to(CONFIGS)) for path in OVERLAYS if path.parent.name in OWN_ROOMS]
    assert len(names) == 22, names
    for path in OVERLAYS:
        settings = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        assert path.read_text().startswith("# "), "the first line says what it is for"
        assert len(settings) <= 15, path


@pytest.mark.parametrize("overlay", [p for p in OVERLAYS if p.parent.name in OWN_ROOMS], ids=lambda path: path.stem)
def test_every_overlay_parses_on_top_of_a_configuration(base, capsys, overlay):
    assert main(["fit", "-c", str(base), "-c", str(overlay), "--print_config"]) == 0
    merged = yaml.safe_load(capsys.readouterr().out)

    def included(part, whole):
        if isinstance(part, dict):
            return all(key in whole and included(value, whole[key]) for key, value in part.items())
        return part == whole

    assert included(yaml.safe_load(overlay.read_text()), merged)
    assert merged["data"]["max_length"] == 16, "the rest stays"


def test_overlays_run_together(base, tmp_path, capsys):
    chosen = ["exits/quarter_half", "objective/ee_tuning", "precision/bf16-mixed", "logger/csv", "debug/fast"]
    overlays = [word for name in chosen for word in ("-c", str(CONFIGS / f"{name}.yaml"))]
    assert main(["fit", "-c", str(base), *overlays, "--run", str(tmp_path / "r"), "--json"]) == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out)["metrics"]
    assert {"train/ce/exit_1", "train/ce/exit_2", "val/nll/full"} <= metrics.keys()
    table = captured.err[captured.err.index("depth ") :].splitlines()
    assert table[0].split() == ["depth", "nll", "accuracy", "agreement", "ece"]
    assert [line.split()[0] for line in table[1:4]] == ["exit_1", "exit_2", "full"]
    assert table[1].split()[1] == f"{metrics['val/nll/exit_1']:.4f}"
    assert table[3].split()[3] == "-"
    assert "Tip" not in captured.err
    written = (tmp_path / "r" / "metrics.csv").read_text()
    assert "train/loss" in written.splitlines()[0]
    again = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert again["model"]["exits"]["fractions"] == [0.25, 0.5]
    assert (again["checkpoint"]["dirpath"], again["ckpt_path"], again["json"]) == (None, None, False)
