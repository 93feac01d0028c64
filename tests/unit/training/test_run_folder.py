import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from eetrain.errors import ConfigError
from eetrain.training.run_folder import check_same_run, start_from
from eetrain.training.run_lock import RunLock

HOLD = "import sys, time; from pathlib import Path; from eetrain.training.run_lock import RunLock\n"
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def held(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_job_is_refused_and_told_who_has_the_folder(tmp_path, held):
    with pytest.raises(ConfigError) as caught:
        RunLock(tmp_path)
    assert caught.value.message.startswith(f"The run folder {tmp_path} is in use by ")
    assert f"process {held.pid}" in caught.value.message
    assert ", since 20" in caught.value.message
    assert "--run" in caught.value.hint
    assert f"process {held.pid}" in json.loads((tmp_path / ".lock").read_text())["owner"], (
        "being refused changes nothing"
    )


def test_a_killed_job_holds_nothing(tmp_path, held):
    os.kill(held.pid, signal.SIGKILL)
    held.wait()
    RunLock(tmp_path).release()
    assert json.loads((tmp_path / ".lock").read_text()) == {}


def test_children_of_a_killed_job_do_not_hold_its_folder(tmp_path):
    fork = HOLD.replace(
        "print(", "import os; child = os.fork()\nif child == 0: time.sleep(30); sys.exit()\nprint(child);print("
    )
    process = subprocess.Popen([sys.executable, "-c", fork, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        process.stdout.readline()
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is there
        RunLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)


def checkpoint(folder, name, step):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {}}, folder / name)
    return str(folder / name)


def test_a_fit_begins_anew_in_an_empty_folder_only(tmp_path):
    folder = tmp_path / "checkpoints"
    assert start_from(tmp_path, folder, "never", None) is None
    assert start_from(tmp_path, folder, "auto", None) is None
    assert start_from(tmp_path, folder, "auto", "elsewhere.ckpt") == "elsewhere.ckpt"
    last = checkpoint(folder, "last.ckpt", 4)
    with pytest.raises(ConfigError, match="holds a run already") as caught:
        start_from(tmp_path, folder, "never", None)
    assert "--resume auto" in caught.value.hint
    assert start_from(tmp_path, folder, "never", "elsewhere.ckpt") == "elsewhere.ckpt"
    assert start_from(tmp_path, folder, "auto", "elsewhere.ckpt") == last
    assert start_from(tmp_path, folder, "auto", None) == last
    newer = checkpoint(folder, "step=6.ckpt", 6)
    assert start_from(tmp_path, folder, "never", "last") == newer


RECIPE = {
    "model": {"exits": {"layers": [1, 2]}, "backbone": {"path": "base", "dtype": "float32"}, "optimizer": {"lr": 1.0}},
    "data": {"train": "a.csv", "batch_size": 4},
}


def with_setting(dotted, value):
    config = json.loads(json.dumps(RECIPE))
    *path, name = dotted.split(".")
    part = config
    for key in path:
        part = part.setdefault(key, {})
    part[name] = value
    return config


@pytest.fixture
def run(tmp_path):
    checkpoint(tmp_path / "checkpoints", "last.ckpt", 4)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "before"),
    [
        ("model.exits.layers", [1, 3], "[1, 2]"),
        ("model.backbone.path", "other", "base"),
        ("model.objective.class_path", "eetrain.objectives.EETuning", "None"),
        ("data.train", "b.csv", "a.csv"),
        ("model.tuning", "lora", "None"),
    ],
)
def test_the_folder_of_another_recipe_is_refused(run, name, value, before):
    with pytest.raises(ConfigError) as caught:
        check_same_run(run, run / "checkpoints", with_setting(name, value))
    assert caught.value.message == (
        f"{run} is the folder of another recipe: its run has {name}={before}, this one {name}={value}."
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.optimizer.lr", 0.1), ("data.batch_size", 8), ("model.backbone.dtype", "bfloat16"), ("run", "x")],
)
def test_what_may_change_in_a_run(run, name, value):
    check_same_run(run, run / "checkpoints", with_setting(name, value))


def test_one_place_written_in_two_ways(run, monkeypatch):
    monkeypatch.chdir(run)
    (run / "a.csv").write_text("x")
    check_same_run(run, run / "checkpoints", with_setting("data.train", str(run / "a.csv")))


def test_a_folder_without_checkpoints_is_anybodys(run):
    (run / "checkpoints" / "last.ckpt").unlink()
    check_same_run(run, run / "checkpoints", with_setting("data.train", "b.csv"))
