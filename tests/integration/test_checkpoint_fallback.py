"""Runs that go on from damaged checkpoints, and folders read by one process, all through the command line."""

import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from eetrain.cli import main
from eetrain.exits import MultiExitModel
from eetrain.testing.runs import write_run
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.checkpoint_fallback import whole_checkpoint
from eetrain.training.checkpoint_folder import CheckpointFolder, save_folder
from eetrain.training.checkpoint_reading import read_checkpoint

DDP = Path(__file__).parents[2] / "configs" / "strategy" / "ddp.yaml"
KEEP_THREE = ["--checkpoint.save_top_k", "3", "--checkpoint.monitor", "step", "--checkpoint.mode", "max"]
KEEP_THREE += ["--checkpoint.every_n_train_steps", "2", "--checkpoint.filename", "{step}"]


class FolderStrategy(SingleDeviceStrategy):
    """One process that writes and restores checkpoint folders, as the strategies of several processes do."""

    def __init__(self):
        super().__init__(device="cpu")

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        (stored,) = checkpoint["optimizer_states"]
        tensors = dict(checkpoint.pop("state_dict"))
        for name, parameter in self._trained():
            for key, value in self.optimizers[0].state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        rest = {**checkpoint, "optimizer_states": [{"param_groups": stored["param_groups"]}]}
        save_folder(filepath, tensors, rest, topology={"stages": 1, "replicas": 1})

    def load_checkpoint(self, checkpoint_path, weights_only=None):
        self.folder = CheckpointFolder.open(self.checkpoint_io.locate(checkpoint_path), check=False)
        return self.folder.checkpoint()

    def load_optimizer_state_dict(self, checkpoint):
        (optimizer,) = self.optimizers
        places = {
            parameter: place for place, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])
        }
        keys = ("exp_avg", "exp_avg_sq", "step")
        state = {
            places[parameter]: {key: self.folder.tensor(f"optimizer/{key}/{name}") for key in keys}
            for name, parameter in self._trained()
        }
        optimizer.load_state_dict({**checkpoint["optimizer_states"][0], "state": state})

    def _trained(self):
        return [(n, p) for n, p in self.lightning_module.named_parameters() if p.requires_grad]


STRATEGIES = {
    "file": [],
    "folder": ["--trainer.strategy", json.dumps({"class_path": f"{__name__}.FolderStrategy"})],
}


def fit(base, form, steps, *settings):
    quick = ["--trainer.limit_val_batches", "0", "--model.optimizer.lr", "0.03", "--trainer.max_steps", str(steps)]
    return main(["fit", "-c", str(base), *STRATEGIES[form], *KEEP_THREE, *quick, *settings])


@pytest.fixture(scope="module", params=STRATEGIES)
def runs(request, tmp_path_factory):
    """The form, and a folder with the checkpoints of 6 steps in ``run`` and those of 8 in ``whole``."""
    root = tmp_path_factory.mktemp(request.param)
    base = write_run(root)
    assert fit(base, request.param, 6) == 0
    assert fit(base, request.param, 8, "--run", str(root / "whole")) == 0
    return request.param, root


@pytest.fixture
def run(runs, tmp_path):
    """The form, a function that resumes a copy of the run of 6 steps up to 8, and the copy's checkpoints."""
    form, root = runs
    shutil.copytree(root / "run", tmp_path / "run")
    resume = functools.partial(fit, root / "base.yaml", form, 8, "--run", str(tmp_path / "run"))
    return form, resume, tmp_path / "run" / "checkpoints"


def whole(runs):
    return runs[1] / "whole" / "checkpoints"


def said_by(call, *arguments):
    """What a command returned and warned of, Lightning's own warnings aside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*arguments)
    return result, [
        text for warning in caught if "damaged" in (text := str(warning.message)) or "cannot be read" in text
    ]


def contents(path):
    """Everything that is trained, and how far."""
    stored = read_checkpoint(path)
    weights = dict(stored["state_dict"])
    if path.is_dir():
        folder = CheckpointFolder.open(path)
        weights |= {name: folder.tensor(name) for name in folder.names}
    else:
        groups = stored["optimizer_states"][0]["state"]
        weights |= {f"{place}/{key}": value for place, state in groups.items() for key, value in state.items()}
    return stored["global_step"], stored["lr_schedulers"], stored["CausalLMDataModule"], weights


def assert_same_run(one, two):
    (*plain, weights), (*others, of_other) = contents(one), contents(two)
    assert plain == others
    assert weights.keys() == of_other.keys()
    assert all(torch.equal(weights[name], of_other[name]) for name in weights)


def part_of(path, name):
    return path / name if path.is_dir() else path


def cut(path):
    path = part_of(path, "trainer.pt")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    path = part_of(path, "weights-00-00.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 16
    path.write_bytes(data)


def lose(path):
    """A file of a folder is gone; of a single file all bytes are."""
    if path.is_dir():
        (path / "manifest.json").unlink()
    else:
        path.write_bytes(b"")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("damage", [cut, flip, lose])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(runs, run, capfd, damage):
    form, resume, kept = run
    assert names_in(kept) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    for name in ("last.ckpt", "step=6.ckpt"):
        damage(kept / name)
    status, (said,) = said_by(resume, "--ckpt_path", "last")
    assert status == 0
    readable = damage is flip or (form, damage) == ("folder", cut)
    assert said.startswith(f"{kept}/last.ckpt ")
    assert f"Going on from {kept}/step=4.ckpt at step 4 instead; " in said
    assert said.endswith(f"{'2' if readable else 'an unknown number of'} steps are lost.")
    assert "Restored all states from" not in capfd.readouterr().err, "it would name the damaged one"
    assert_same_run(kept / "last.ckpt", whole(runs) / "last.ckpt")
    assert contents(kept / "step=6.ckpt")[0] == 6, "written again"


def test_without_a_whole_checkpoint_nothing_is_trained(run, capsys):
    _, resume, kept = run
    for path in kept.iterdir():
        flip(path)
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert resume("--ckpt_path", "last") == 1
    error = capsys.readouterr().err
    assert f"error: {kept}/last.ckpt is damaged: " in error
    assert f"No other checkpoint in {kept} is whole.\nHINT: Use an older checkpoint of the run.\n" in error
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before


def test_the_last_three_are_kept(runs):
    kept = whole(runs)
    assert names_in(kept) == ["last.ckpt", "step=4.ckpt", "step=6.ckpt", "step=8.ckpt"]
    assert all(path.is_dir() == (runs[0] == "folder") for path in kept.iterdir())
    assert [contents(path)[0] for path in sorted(kept.iterdir())] == [8, 4, 6, 8]


@pytest.fixture
def in_place(runs, tmp_path):
    """The run of 6 steps itself, put back afterwards: Lightning goes on counting only where it has counted."""
    shutil.copytree(runs[1] / "run", tmp_path / "kept")
    yield runs[1] / "run" / "checkpoints"
    shutil.rmtree(runs[1] / "run")
    shutil.copytree(tmp_path / "kept", runs[1] / "run")


def test_a_kill_between_two_renames_is_no_reason_to_start_anew(runs, in_place):
    (in_place / "last.ckpt").rename(in_place / ".last.ckpt.old")
    assert fit(runs[1] / "base.yaml", runs[0], 8, "--ckpt_path", "last") == 0
    assert names_in(in_place) == names_in(whole(runs)), "the oldest has gone, and what stood aside"
    assert_same_run(in_place / "last.ckpt", whole(runs) / "last.ckpt")


def test_last_as_a_link_costs_no_second_copy(runs, run):
    _, resume, kept = run
    assert resume("--ckpt_path", "last", "--checkpoint.save_last", "link") == 0
    assert os.readlink(kept / "last.ckpt") == "step=8.ckpt"
    assert_same_run(kept / "last.ckpt", whole(runs) / "last.ckpt")
    flip(kept / "last.ckpt")
    found, (said,) = said_by(whole_checkpoint, kept / "last.ckpt")
    assert found == kept / "step=6.ckpt"
    assert said.endswith("2 steps are lost.")


def test_export_replaces_a_damaged_last_but_none_that_is_named(run, tmp_path, capsys):
    _, _, kept = run
    for name in ("last.ckpt", "step=6.ckpt"):
        flip(kept / name)
    status, (said,) = said_by(main, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert status == 0
    assert said.startswith(f"{kept}/last.ckpt is damaged: ")
    assert said.endswith(f"Going on from {kept}/step=4.ckpt at step 4 instead; 2 steps are lost.")
    exported = MultiExitModel.from_pretrained(tmp_path / "out").exits["1"].norm.weight
    assert torch.equal(exported, contents(kept / "step=4.ckpt")[-1]["model.exits.1.norm.weight"])
    assert not torch.equal(exported, contents(kept / "step=2.ckpt")[-1]["model.exits.1.norm.weight"])
    for source in ([str(kept / "last.ckpt")], [str(tmp_path / "run"), "--checkpoint", "step=6"]):
        capsys.readouterr()
        assert main(["export", *source, "--out", str(tmp_path / "named")]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {kept}/")
        assert ".ckpt is damaged: " in error
        assert "HINT: Use an older checkpoint of the run." in error
    assert not (tmp_path / "named").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps whose one checkpoint is there as a folder and, the same, as a file."""
    folder = tmp_path_factory.mktemp("trained")
    assert fit(write_run(folder), "folder", 2, "--checkpoint.save_top_k", "0") == 0
    last = folder / "run" / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(read_checkpoint(last), last.with_name("file.ckpt"))
    return folder


def scores_of(capsys, verb, *settings):
    capsys.readouterr()
    assert main([verb, *map(str, settings), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    return {name.partition("/")[2]: value for name, value in metrics.items()}


def test_a_folder_is_scored_like_a_file_by_a_plain_run(trained, tmp_path, capsys):
    kept = trained / "run" / "checkpoints"
    rest = ["--data.tokenizer", trained / "model", "--trainer.accelerator", "cpu", "--run", tmp_path]
    rest += ["--data.batch_size", 4, "--data.max_length", 16]  # as in the run's own file: sums go in the same order
    held_out = trained / "eval.jsonl"
    of_file = scores_of(capsys, "test", "--ckpt_path", kept / "file.ckpt", "--data.test", held_out, *rest)
    assert {"nll/exit_1", "nll/full"} <= of_file.keys(), "the model's settings are the checkpoint's"
    assert scores_of(capsys, "test", "--ckpt_path", kept / "last.ckpt", "--data.test", held_out, *rest) == of_file
    validate = ["--ckpt_path", kept / "last.ckpt", "--data.validation", held_out, *rest]
    assert scores_of(capsys, "validate", *validate) == of_file
    assert scores_of(capsys, "test", "-c", trained / "base.yaml", "--ckpt_path", "last") == of_file


def test_a_folder_predicts_like_a_file(trained, tmp_path):
    texts = []
    for name in ("last.ckpt", "file.ckpt"):
        path, out = trained / "run" / "checkpoints" / name, tmp_path / name
        few = ["--model.predict_max_new_tokens", "3", "--run", str(out)]
        assert main(["predict", "-c", str(trained / "base.yaml"), "--ckpt_path", str(path), *few]) == 0
        texts.append((out / "predictions.jsonl").read_text())
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 7


def test_evaluation_takes_no_other_checkpoint(trained, tmp_path, capsys):
    kept = trained / "run" / "checkpoints"
    shutil.copytree(kept / "last.ckpt", tmp_path / "a.ckpt")
    shutil.copytree(kept / "last.ckpt", tmp_path / "b.ckpt")
    flip(tmp_path / "a.ckpt")
    assert main(["test", "-c", str(trained / "base.yaml"), "--ckpt_path", str(tmp_path / "a.ckpt")]) == 1
    assert f"error: {tmp_path}/a.ckpt is damaged: weights-00-00.safetensors is not" in capsys.readouterr().err


def test_a_plain_run_does_not_resume_from_a_folder(trained, capsys):
    last = trained / "run" / "checkpoints" / "last.ckpt"
    for path in ("last", str(last)):
        assert main(["fit", "-c", str(trained / "base.yaml"), "--trainer.max_steps", "4", "--ckpt_path", path]) == 2
        error = capsys.readouterr().err
        assert (
            f"error: {last} is a checkpoint folder, whose optimizer the strategy of this run cannot restore." in error
        )
        assert (
            "HINT: Resume with the strategy it was trained with; on one process with a pipeline of one stage" in error
        )
    assert contents(last)[0] == 2


def test_export_of_a_folder_is_that_of_the_file(trained, tmp_path, capsys):
    for out, source in (("of run", trained / "run"), ("of file", trained / "run" / "checkpoints" / "file.ckpt")):
        capsys.readouterr()
        assert main(["export", str(source), "--out", str(tmp_path / out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verified"] is True
    assert names_in(tmp_path / "of run") == names_in(tmp_path / "of file")
    for file in (tmp_path / "of file").iterdir():
        assert (tmp_path / "of run" / file.name).read_bytes() == file.read_bytes(), file.name


def test_export_of_a_folder_checks_what_it_wrote(trained, tmp_path, capsys, monkeypatch):
    import eetrain.checkpoints.export as export

    save = export.save_checkpoint

    def save_another(model, folder, **settings):
        with torch.no_grad():
            model.exits["2"].norm.weight.add_(1)
            save(model, folder, **settings)
            model.exits["2"].norm.weight.sub_(1)

    monkeypatch.setattr(export, "save_checkpoint", save_another)
    last = trained / "run" / "checkpoints" / "last.ckpt"
    assert main(["export", str(last), "--out", str(tmp_path / "out")]) == 1
    assert "exit 2 gives other logits than the run it was exported from" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_go_on_from_the_same_checkpoint(tmp_path):
    base, kept = write_run(tmp_path), tmp_path / "run" / "checkpoints"
    ddp = ["-c", str(DDP), "--trainer.devices", "2", "--trainer.limit_val_batches", "0"]

    def fit_on_two(steps, *settings):
        words = ["fit", "-c", str(base), *ddp, *KEEP_THREE, "--trainer.max_steps", str(steps), *settings]
        return subprocess.run(
            [sys.executable, "-m", "eetrain", *words], check=True, capture_output=True, text=True, timeout=120
        ).stderr

    fit_on_two(4)
    for name in ("last.ckpt", "step=4.ckpt"):
        flip(kept / name)
    said = fit_on_two(6, "--ckpt_path", "last")
    assert said.count(f"Going on from {kept}/step=2.ckpt at step 2 instead; 2 steps are lost.") == 1
    fit_on_two(6, "--run", str(tmp_path / "whole"))
    assert_same_run(kept / "last.ckpt", tmp_path / "whole" / "checkpoints" / "last.ckpt")
