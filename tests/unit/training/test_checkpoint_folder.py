"""The checkpoint folder, written and read by one process: what it holds, what is noticed, and what a kill leaves."""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import weakref

import pytest
import torch
from safetensors.torch import load_file

from eetrain.errors import CheckpointError
from eetrain.training import checkpoint_folder
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.checkpoint_folder import CheckpointFolder, is_checkpoint_folder, save_folder

TOPOLOGY = {"stages": 2, "replicas": 3}
ONE, TWO = "model.exits.1.norm.weight", "optimizer/exp_avg/model.exits.1.norm.weight"


def state(step):
    return {"global_step": step, "epoch": 1, "callbacks": {"a": {"score": torch.tensor(0.5)}}, "state_dict": {}}


def save(target, step=1, tensors=None, **changes):
    tensors = {ONE: torch.full((8,), float(step)), TWO: torch.arange(6.0)} if tensors is None else tensors
    save_folder(target, tensors, {**state(step), **changes}, topology=TOPOLOGY)


def step_of(target):
    """The step of a checkpoint, all of it read and checked."""
    folder = CheckpointFolder.open(target)
    assert folder.state_dict()[ONE].tolist() == [float(folder.global_step)] * 8
    assert folder.trainer_state()["global_step"] == folder.global_step
    return folder.global_step


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_given_comes_back(tmp_path):
    buffer = torch.arange(10.0)
    tied = torch.randn(3, 4)
    tensors = {
        "model.backbone.embed.weight": tied,
        "model.backbone.head.weight": tied,
        "model.backbone.a": buffer[:4],
        "model.backbone.b": buffer[4:],
        "model.exits.1.turned": torch.randn(4, 5).T,
        "model.exits.1.short": torch.randn(2, 2).bfloat16(),
        "model.exits.1.empty": torch.zeros(0, 3),
        "model.gates.mask": torch.tensor([True, False]),
        "model.gates.count": torch.tensor(7),
        "optimizer/step/model.exits.1.short": torch.tensor(3.0),
        "optimizer/master/model.exits.1.short": torch.nn.Parameter(torch.randn(2, 2)),
    }
    save(tmp_path / "last.ckpt", 12, tensors)
    folder = CheckpointFolder.open(tmp_path / "last.ckpt")
    assert folder.names == tensors.keys()
    assert (folder.topology, folder.global_step) == (TOPOLOGY, 12)
    for name, tensor in tensors.items():
        found = folder.tensor(name)
        assert (found.dtype, found.shape, found.requires_grad) == (tensor.dtype, tensor.shape, False), name
        assert torch.equal(found, tensor), name
    model = {name for name in tensors if name.startswith("model.")}
    assert set(folder.state_dict()) == model
    assert set(folder.checkpoint()["state_dict"]) == model
    assert folder.trainer_state() == {key: value for key, value in state(12).items() if key != "state_dict"}
    with pytest.raises(CheckpointError, match=r"last.ckpt holds no tensor 'model.nope'"):
        folder.tensor("model.nope")


def test_the_files_are_plain_and_vouched_for(tmp_path):
    target = tmp_path / "last.ckpt"
    save(target, 3)
    manifest = json.loads((target / "manifest.json").read_text())
    assert names_in(target) == ["manifest.json", "trainer.pt", "weights-00-00.safetensors"]
    assert (manifest["format"], manifest["global_step"], manifest["topology"]) == (1, 3, TOPOLOGY)
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["tensors"] == {ONE: "weights-00-00.safetensors", TWO: "weights-00-00.safetensors"}
    assert manifest["files"].keys() == {"trainer.pt", "weights-00-00.safetensors"}
    for name, record in manifest["files"].items():
        data = (target / name).read_bytes()
        assert record == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert load_file(target / "weights-00-00.safetensors")[ONE].tolist() == [3.0] * 8
    assert torch.load(target / "trainer.pt", weights_only=True)["global_step"] == 3


def test_tensors_from_an_iterator_are_not_held_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "SHARD_BYTES", 1000)
    alive, most = weakref.WeakSet(), 0

    def fresh():
        nonlocal most
        for number in range(20):
            tensor = torch.full((75,), float(number))  # 300 bytes, 3 of which fit into a file
            alive.add(tensor.untyped_storage())
            most = max(most, len(alive))
            yield f"model.{number}", tensor

    save(tmp_path / "last.ckpt", tensors=fresh())
    assert most <= 5
    folder = CheckpointFolder.open(tmp_path / "last.ckpt")
    assert len(names_in(folder.path)) == 7 + 2
    assert all(path.stat().st_size < 1400 for path in folder.path.glob("*.safetensors"))
    assert [folder.tensor(f"model.{number}")[0].item() for number in range(20)] == list(range(20))


def test_what_is_a_checkpoint_folder(tmp_path):
    target = tmp_path / "last.ckpt"
    assert not is_checkpoint_folder(target)
    save(target)
    assert is_checkpoint_folder(target)
    (target / "manifest.json").unlink()
    assert is_checkpoint_folder(str(target)), "a damaged one is one too"
    (target / "trainer.pt").unlink()
    assert not is_checkpoint_folder(target)
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "file.ckpt")
    assert not is_checkpoint_folder(tmp_path / "file.ckpt")


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "trainer.pt", "weights-00-00.safetensors"])
@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_every_damage_is_named(tmp_path, name, how):
    target = tmp_path / "last.ckpt"
    save(target)
    size = (target / name).stat().st_size
    {"gone": os.unlink, "cut": cut, "flipped": flip}[how](target / name)
    said = {
        "gone": f"{name} is missing",
        "cut": f"{name} has {size - 3:,} bytes instead of {size:,}",
        "flipped": f"{name} is not what was written (its checksum differs)",
    }[how]
    if name == "manifest.json" and how == "cut":
        said = "manifest.json cannot be read"
    with pytest.raises(CheckpointError) as caught:
        CheckpointFolder.open(target)
    assert caught.value.message == f"{target} is damaged: {said}."
    assert caught.value.hint == "Use an older checkpoint of the run."


def test_several_damages_are_all_named(tmp_path):
    save(tmp_path / "last.ckpt")
    flip(tmp_path / "last.ckpt" / "trainer.pt")
    (tmp_path / "last.ckpt" / "weights-00-00.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"trainer.pt is not .*; weights-00-00.safetensors is missing\."):
        CheckpointFolder.open(tmp_path / "last.ckpt")
    assert CheckpointFolder.open(tmp_path / "last.ckpt", check=False).global_step == 1


def test_no_byte_of_the_manifest_can_change_unnoticed(tmp_path):
    path = tmp_path / "last.ckpt" / "manifest.json"
    save(path.parent)
    whole = path.read_bytes()
    for place in range(len(whole) - 1):  # the last one is the line's end
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest.json"):
            CheckpointFolder.open(path.parent)
    path.write_bytes(whole)
    assert step_of(path.parent) == 1


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("eetrain.training.checkpoint_manifest.FORMAT", 2)
    save(tmp_path / "last.ckpt")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2; this version of eetrain reads 1") as caught:
        CheckpointFolder.open(tmp_path / "last.ckpt")
    assert caught.value.hint == "Read it with the eetrain that wrote it."


class Odd:
    """Pickles, but the safe reader refuses it."""


def broken_iterator():
    yield ONE, torch.ones(8)
    raise RuntimeError("the device is gone")


FAILURES = {
    "state that does not pickle": ({"callbacks": {"f": lambda: 0}}, None, "pickle"),
    "state that cannot be read safely": ({"callbacks": {"f": Odd()}}, None, "Weights only load failed"),
    "weights in the state": ({"state_dict": {ONE: torch.ones(1)}}, None, "trainer_state holds weights of the model"),
    "a name twice": ({}, lambda: iter([(ONE, torch.ones(8))] * 2), f"the tensor {ONE!r} is given twice"),
    "an iterator that fails": ({}, broken_iterator, "the device is gone"),
    "a tensor without data": ({}, lambda: {ONE: torch.ones(3, device="meta")}, "meta tensor"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_leaves_the_checkpoint_before(tmp_path, case):
    changes, tensors, reason = FAILURES[case]
    save(tmp_path / "last.ckpt", 1)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "last.ckpt", 2, None if tensors is None else tensors(), **changes)
    begin, end = f"The checkpoint {tmp_path}/last.ckpt could not be written: ", ". The previous checkpoint is whole."
    assert caught.value.message.startswith(begin)
    assert reason in caught.value.message
    assert caught.value.message.endswith(end)
    assert "--resume auto" in caught.value.hint
    assert step_of(tmp_path / "last.ckpt") == 1
    assert names_in(tmp_path) == ["last.ckpt"]


def test_a_first_checkpoint_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "last.ckpt", 2, broken_iterator())
    assert caught.value.message.endswith("could not be written: the device is gone.")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("place", ["runs/last.ckpt", "runs/deep/last.ckpt"])
def test_a_folder_that_is_a_file(tmp_path, place):
    (tmp_path / "runs").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written: (File exists|Not a directory)"):
        save(tmp_path / place)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "thesis.tex").write_text("")
    for write in (save, lambda target: AtomicCheckpointIO().save_checkpoint({}, target)):
        with pytest.raises(CheckpointError, match=r"could not be written: Is a directory\. HINT"):
            write(tmp_path / "last.ckpt")
    assert names_in(tmp_path) == ["last.ckpt"]
    assert names_in(tmp_path / "last.ckpt") == ["thesis.tex"]


def in_a_child(work, *arguments):
    """What ``work`` returned in a child process, or ``None`` if it was killed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=lambda: theirs.send(work(*arguments)))
    child.start()
    theirs.close()
    child.join()
    return ours.recv() if ours.poll() and child.exitcode == 0 else None


def save_with_little_room(target, tensors, **changes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    checkpoint_folder.SHARD_BYTES, given = 50_000, []

    def watched():
        for name in tensors:
            yield name, tensors[name]
            given.append(name)

    try:
        save(target, 2, watched(), **changes)
    except CheckpointError as error:
        return error.message, given
    return "written", given


LARGE = {
    "weights": ({f"model.{number}": torch.zeros(10_000) for number in range(6)}, {}),
    "state": ({ONE: torch.ones(8)}, {"callbacks": {"seen": "x" * 30_000}}),
}


@pytest.mark.parametrize("what", LARGE)
def test_no_room_leaves_the_checkpoint_before(tmp_path, what):
    target, (tensors, changes) = tmp_path / "last.ckpt", LARGE[what]
    save(target, 1)
    message, given = in_a_child(lambda: save_with_little_room(target, tensors, **changes))
    assert message.startswith(f"The checkpoint {target} could not be written: ")
    assert "File too large" in message
    assert message.endswith("The previous checkpoint is whole.")
    assert given == list(tensors), "the iterator is consumed to its end"
    assert step_of(target) == 1
    assert names_in(tmp_path) == ["last.ckpt"]


def die_at(moment, work):
    """Do ``work`` and be killed at the ``moment``-th call that changes the disk; else return how many there were."""
    calls = 0

    def counting(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counting(getattr(os, name)))
    checkpoint_folder.save_file = counting(checkpoint_folder.save_file)
    torch.save = counting(torch.save)
    work()
    return calls


@pytest.mark.parametrize("before", ["whole", "broken off"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(tmp_path, before):
    found, aside = [], 0
    for moment in range(1, 100):
        target = tmp_path / str(moment) / "last.ckpt"
        save(target, 1)
        if before == "broken off":  # a kill between two renames, and a half written one beside it
            target.rename(target.with_name(".last.ckpt.old"))
            target.with_name(".last.ckpt.part").mkdir()
        calls = in_a_child(die_at, moment, lambda target=target: save(target, 2))
        aside += not target.exists()
        found.append(step_of(target))
        if calls is not None:
            break
        save(target, 3)
        assert step_of(target) == 3
        assert names_in(target.parent) == ["last.ckpt"]
    assert calls == moment - 1 > 10
    assert found == sorted(found), "once the new one is there it stays"
    assert found[0] == 1
    assert found[-2:] == [2, 2], "killed while the old one was deleted, and not killed"
    assert aside == (1 if before == "whole" else found.index(2)), "the state between the renames was among them"


def test_a_kill_while_a_checkpoint_is_removed_leaves_all_or_nothing(tmp_path):
    found = []
    for moment in range(1, 20):
        target = tmp_path / str(moment) / "step=2.ckpt"
        save(target)
        calls = in_a_child(die_at, moment, lambda target=target: AtomicCheckpointIO().remove_checkpoint(target))
        found.append(is_checkpoint_folder(target))
        if found[-1]:
            assert step_of(target) == 1
        assert list(target.parent.glob("*.ckpt")) == [target] * found[-1]
        if calls is not None:
            break
    assert calls == moment - 1
    assert found == sorted(found, reverse=True)
    assert found.count(True) >= 1
    assert found.count(False) >= 4, "also in the middle of its files"


def test_removal_takes_all_forms_and_what_stands_beside(tmp_path):
    target = tmp_path / "step=2.ckpt"
    save(target)
    save(target.with_name(".step=2.ckpt.old"))
    AtomicCheckpointIO().remove_checkpoint(target)
    assert names_in(tmp_path) == []
    AtomicCheckpointIO().save_checkpoint({}, target)
    AtomicCheckpointIO().remove_checkpoint(target)
    AtomicCheckpointIO().remove_checkpoint(target)
    assert names_in(tmp_path) == []


def test_folders_files_and_links_replace_each_other(tmp_path):
    target, other = tmp_path / "last.ckpt", tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, target)
    save(target, 2)
    assert step_of(target) == 2
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, target)
    assert torch.load(target, weights_only=True) == {"global_step": 3}
    save(other, 1)
    for write in (save, lambda target, step: AtomicCheckpointIO().save_checkpoint({"global_step": step}, target)):
        AtomicCheckpointIO().remove_checkpoint(target)
        target.symlink_to(other.name)
        assert step_of(target) == 1
        write(target, 4)
        assert not target.is_symlink()
        assert step_of(other) == 1, "what the link led to is untouched"
    assert names_in(tmp_path) == ["last.ckpt", "step=1.ckpt"]
