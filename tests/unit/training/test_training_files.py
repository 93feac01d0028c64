import json
import multiprocessing
import resource

import pytest
import torch

from eetrain.errors import CheckpointError
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.randomness import batch_seed, seed_generators

LARGE = torch.zeros(1_000_000)  # made here: a forked child has no threads to fill it


def save(value, path):
    AtomicCheckpointIO().save_checkpoint({"weights": torch.full((10,), value)}, path)


def test_a_checkpoint_replaces_the_one_before(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    save(1.0, path)
    save(2.0, path)
    assert torch.load(path, weights_only=True)["weights"].tolist() == [2.0] * 10
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def _save_with_little_room(path, size, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        AtomicCheckpointIO().save_checkpoint({"weights": LARGE}, path)
    except CheckpointError as error:
        out.send((error.message, error.hint))
    else:
        out.send(None)


def test_no_room_leaves_the_checkpoint_before_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    save(1.0, path)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_save_with_little_room, args=(path, 200_000, theirs))
    child.start()
    message, hint = ours.recv()
    child.join()
    assert f"{path} could not be written: File too large. The previous checkpoint is whole." in message
    assert "--resume auto" in hint
    assert torch.load(path, weights_only=True)["weights"].tolist() == [1.0] * 10
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written: (File exists|Not a directory)"):
        save(1.0, tmp_path / "runs" / "last.ckpt")


def test_seeds_differ_by_run_rank_and_batch_and_repeat():
    seeds = {batch_seed(seed, rank, number) for seed in range(3) for rank in range(3) for number in range(50)}
    assert len(seeds) == 3 * 3 * 50
    assert batch_seed(1, 2, 3) == batch_seed(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_follow_the_seed():
    def draws(seed):
        import random

        import numpy

        seed_generators(seed)
        return json.dumps([random.random(), float(numpy.random.rand()), torch.rand(2).tolist()])

    assert draws(5) == draws(5) != draws(6)
