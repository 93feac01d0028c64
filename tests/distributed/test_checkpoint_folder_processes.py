"""Checkpoint folders written and read by two and three processes together, and what happens when one of them fails."""

import resource
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from eetrain.errors import CheckpointError
from eetrain.testing.processes import run_on_processes
from eetrain.training import checkpoint_folder
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.checkpoint_fallback import whole_checkpoint
from eetrain.training.checkpoint_folder import CheckpointFolder, TorchProcesses, save_folder
from eetrain.training.checkpoint_manifest import FileRecord

BLOCKS = 6


def all_tensors(step):
    """Weights and optimizer states of six blocks."""
    names = [f"model.backbone.{block}.weight" for block in range(BLOCKS)]
    names += [f"optimizer/exp_avg/{name}" for name in names]
    return {name: torch.full((5000,), 100.0 * step + place) for place, name in enumerate(names)}


def own_tensors(step, rank, count):
    """Those of the stage ``rank`` of ``count``."""
    blocks = {str(block) for block in range(BLOCKS) if block * count // BLOCKS == rank}
    return {name: tensor for name, tensor in all_tensors(step).items() if name.split(".")[2] in blocks}


def save(target, step, tensors=None, **changes):
    processes = TorchProcesses()
    tensors = own_tensors(step, processes.rank, dist.get_world_size()) if tensors is None else tensors
    state = {"global_step": step, **changes} if processes.rank == 0 else {}
    topology = {"stages": dist.get_world_size(), "replicas": 1}
    save_folder(target, tensors, state, topology=topology, processes=processes)


def error_of(call, *arguments, **changes):
    try:
        call(*arguments, **changes)
    except CheckpointError as error:
        return error.message
    return None


class Common:
    """Tensors that the processes make together, one after the other, as sharded parameters are put together."""

    def __init__(self, names):
        self.names, self.made = names, 0

    def __iter__(self):
        for name in self.names:
            tensor = torch.ones(5000)
            dist.all_reduce(tensor)
            self.made += 1
            yield name, tensor


def failing_saves(folder):
    """Messages of saves that fail on one process each; ``last.ckpt`` of step 1 is there."""
    rank, target, said = dist.get_rank(), Path(folder) / "last.ckpt", {}
    mine = [f"model.{rank}.{number}" for number in range(8)]
    save(target, 1)

    twice = {f"model.{rank}": torch.ones(1), "model.x": torch.ones(1)}
    said["a tensor given by two"] = error_of(save, target, 2, twice)
    said["state"] = error_of(save, target, 2, callbacks={"f": lambda: 0})
    said["a tensor"] = error_of(save, target, 2, {"model.x": torch.ones(2, device="meta" if rank == 1 else "cpu")})
    said["nothing to write beside"] = error_of(save, target / "trainer.pt" / "x.ckpt", 2)
    elsewhere = Path(folder) / f"disk of {rank}" / "last.ckpt"
    said["no common disk"] = error_of(save, elsewhere, 2).replace(str(elsewhere), "X")

    checkpoint_folder.SHARD_BYTES = 20_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    common = Common(mine)
    said["no room"] = error_of(save, target, 2, iter(common))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert common.made == 8, "nobody may be left alone in the common work"

    dist.barrier()  # the first process cleans up while the others go on
    left = sorted(path.name for path in Path(folder).iterdir())
    step = CheckpointFolder.open(target, processes=TorchProcesses()).global_step
    save(target, 2)
    return said, left, (step, CheckpointFolder.open(target, processes=TorchProcesses()).global_step)


def reading(folder, whole):
    """What every process finds in checkpoints of which some are damaged, and which files of a whole one it reads."""
    read, measure = [], FileRecord.of
    FileRecord.of = staticmethod(lambda path: (read.append(path.name), measure(path))[1])
    folder, processes = Path(folder), TorchProcesses()
    CheckpointFolder.open(whole, processes=processes)
    found = {"read": list(read)}
    found["error"] = error_of(CheckpointFolder.open, folder / "last.ckpt", processes=processes)
    found["manifest"] = error_of(CheckpointFolder.open, folder / "step=6.ckpt", processes=processes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found["whole"] = whole_checkpoint(folder / "last.ckpt", processes).name
        found["resumed"] = AtomicCheckpointIO(resuming=True).locate(folder / "last.ckpt").name
        found["file"] = AtomicCheckpointIO(resuming=True).load_checkpoint(folder / "files" / "last.ckpt")["global_step"]
    return found, [str(warning.message) for warning in said]


def all_three(folder):
    """In one start of the processes: write, fail, read."""
    save(Path(folder) / "written" / "last.ckpt", 3)
    (Path(folder) / "failing").mkdir(exist_ok=True)
    failed = failing_saves(str(Path(folder) / "failing"))
    return failed, reading(folder, str(Path(folder) / "written" / "last.ckpt"))


@pytest.fixture(scope="module", params=[2, 3])
def ran(request, tmp_path_factory):
    """Folder, number of processes, and what each returned."""
    root = tmp_path_factory.mktemp("processes")
    write_damaged(root)
    return root, request.param, run_on_processes(all_three, request.param, str(root), timeout=90.0)


def write_damaged(root):
    """Folders of steps 8, 6, 4 and 2, the first two damaged, and files of steps 5 and 3, the first damaged."""
    for name, step in (("last.ckpt", 8), ("step=6.ckpt", 6), ("step=4.ckpt", 4), ("step=2.ckpt", 2)):
        save_folder(root / name, {"model.x": torch.ones(9)}, {"global_step": step}, topology={"stages": 1})
    (root / "last.ckpt" / "weights-00-00.safetensors").write_bytes(b"cut")
    (root / "step=6.ckpt" / "manifest.json").unlink()
    files = root / "files"
    for step, name in ((5, "last"), (3, "step=3")):
        AtomicCheckpointIO().save_checkpoint({"global_step": step, "w": torch.ones(9)}, files / f"{name}.ckpt")
    (files / "last.ckpt").write_bytes((files / "last.ckpt").read_bytes()[:-60])


def test_what_several_write_one_reads_as_written_by_one(ran, tmp_path):
    root, count, _ = ran
    save_folder(tmp_path / "one.ckpt", all_tensors(3), {"global_step": 3}, topology={"stages": 1, "replicas": 1})
    one, several = (CheckpointFolder.open(path) for path in (tmp_path / "one.ckpt", root / "written" / "last.ckpt"))
    assert several.topology == {"stages": count, "replicas": 1}
    assert one.names == several.names == all_tensors(3).keys()
    assert all(torch.equal(one.tensor(name), several.tensor(name)) for name in one.names)
    assert one.trainer_state() == several.trainer_state() == {"global_step": 3}
    assert set(several.state_dict()) == {f"model.backbone.{block}.weight" for block in range(BLOCKS)}
    assert sorted(path.name for path in several.path.iterdir()) == [
        *("manifest.json", "trainer.pt"),
        *(f"weights-{rank:02d}-00.safetensors" for rank in range(count)),
    ]
    for block in range(BLOCKS):
        file = several._files[f"optimizer/exp_avg/model.backbone.{block}.weight"]
        assert file == f"weights-{block * count // BLOCKS:02d}-00.safetensors", "each stage writes its own"


def test_one_that_fails_fails_all_at_once(ran):
    root, count, results = ran
    results = [failed for failed, _ in results]
    assert all(result == results[0] for result in results), "the same words on every process"
    said, left, steps = results[0]
    target = root / "failing" / "last.ckpt"
    reasons = {
        "a tensor given by two": "process 0: the tensor 'model.x' is given by two processes.",
        "state": "process 0: ",
        "a tensor": "process 1: Cannot copy out of meta tensor; no data!",
        "no room": "process 1: ",
    }
    for case, reason in reasons.items():
        assert said[case].startswith(f"The checkpoint {target} could not be written: {reason}"), case
        assert said[case].endswith(". The previous checkpoint is whole."), case
    assert "pickle" in said["state"]
    assert "File too large" in said["no room"]
    assert "could not be written: process 0: Not a directory" in said["nothing to write beside"]
    unseen = "process 0: it does not see weights-01-00.safetensors; all processes must write to one disk"
    assert said["no common disk"].startswith(f"The checkpoint X could not be written: {unseen}")
    assert left == [*(f"disk of {rank}" for rank in range(count)), "last.ckpt"]
    assert list((root / "failing" / "disk of 0").iterdir()) == []
    assert steps == (1, 2)


def test_all_read_a_share_and_come_to_one_answer(ran):
    root, count, results = ran
    results = [found for _, found in results]
    read = [name for found, _ in results for name in found["read"]]
    assert sorted(read) == ["trainer.pt", *(f"weights-{rank:02d}-00.safetensors" for rank in range(count))]
    assert all(found["read"] for found, _ in results), "each file is read once, by one process or another"
    for found, _ in results:
        assert found["error"].startswith(f"{root}/last.ckpt is damaged: weights-00-00.safetensors has 3 bytes")
        assert found["manifest"] == f"{root}/step=6.ckpt is damaged: manifest.json is missing."
        assert (found["whole"], found["resumed"], found["file"]) == ("step=4.ckpt", "step=4.ckpt", 3)
    said = [warned for _, warned in results]
    assert [len(warned) for warned in said] == [3] + [0] * (count - 1), "only one process warns"
    assert said[0][0].endswith(f"Going on from {root}/step=4.ckpt at step 4 instead; 4 steps are lost.")
    assert "an unknown number of steps are lost" in said[0][2]
