"""Kills at random moments, many inside the writing of a checkpoint: the restarted run is the one never killed."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from comparing import assert_same

from eetrain.testing.runs import write_run
from eetrain.training.checkpoint_reading import read_checkpoint

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "configs" / "strategy"
STEPS = 24
TOPOLOGIES = {
    "one process": [],
    "ddp": ["-c", CONFIGS / "ddp.yaml", "--trainer.devices", 2],
    "pipeline": ["-c", CONFIGS / "pipeline.yaml", "--trainer.devices", 2],
}
KILLS = {"one process": (5, 3), "ddp": (4, 2), "pipeline": (4, 2)}  # at any moment, inside writing


@pytest.fixture(scope="module", params=TOPOLOGIES)
def course(request, tmp_path_factory):
    """A configuration, the words that run it, and the folder of the run that is never killed."""
    folder = tmp_path_factory.mktemp("kills")
    # Large enough that writing takes some milliseconds.
    base = write_run(folder, "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    config = yaml.safe_load(base.read_text())
    config["checkpoint"] = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    config["trainer"] |= {"max_steps": STEPS, "log_every_n_steps": 1, "limit_val_batches": 0}
    base.write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "eetrain", "fit", "-c", base, *TOPOLOGIES[request.param], "--resume", "auto"]
    assert run(words, folder / "whole").wait() == 0
    return request.param, words, folder


def run(words, folder):
    log = open(folder.with_suffix(".log"), "a")  # noqa: SIM115 - the process's, as long as it lives
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, words), "--run", str(folder)], stdout=log, stderr=log, env=environ, start_new_session=True
    )


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parts(folder):
    return list((folder / "checkpoints").glob(".*.part"))


def kill_at_any_moment(process, folder, draw):
    """After the first step, so that there is something to lose."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.8))
    kill(process)


def kill_inside_writing(process, folder, draw):
    wanted, deadline = draw.randint(1, 12), time.monotonic() + 120
    for _ in range(wanted):
        while not parts(folder):
            assert time.monotonic() < deadline
            assert process.poll() is None
        if _ < wanted - 1:
            while parts(folder):
                pass
    time.sleep(draw.uniform(0, 0.004))
    kill(process)


def losses(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file)]


def test_a_killed_run_ends_as_one_never_killed(course):
    name, words, folder = course
    draw, any_moment, inside = random.Random(name), *KILLS[name]
    done = {"any moment": 0, "inside writing": 0}
    tries = 0
    while done["any moment"] < any_moment or done["inside writing"] < inside:
        tries += 1
        assert tries < 40, done
        place = folder / f"killed-{tries}"
        process = run(words, place)
        (kill_inside_writing if done["inside writing"] < inside else kill_at_any_moment)(process, place, draw)
        done["inside writing" if parts(place) else "any moment"] += 1
        found = sorted(path.name for path in place.glob("checkpoints/*"))
        assert run(words, place).wait(timeout=240) == 0, (found, place.with_suffix(".log").read_text()[-3000:])
        assert losses(place) == losses(folder / "whole"), found
        once, again = (read_checkpoint(at / "checkpoints" / "last.ckpt") for at in (folder / "whole", place))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert_same(once[part], again[part], f"{found}: {part}")
        assert not parts(place), "what was half written is gone"
    print(json.dumps({name: done}), torch.__version__)
