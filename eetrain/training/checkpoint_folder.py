"""Writing a checkpoint folder, by all processes of a run together.

Its form is described in :mod:`eetrain.training.checkpoint_manifest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from eetrain.training.checkpoint_manifest import (
    TRAINER_FILE,
    FileRecord,
    Manifest,
    installed_versions,
    is_checkpoint_folder,
    refuse_foreign_folder,
    unwritten,
    weights_file,
)
from eetrain.training.checkpoint_reading import CheckpointFolder
from eetrain.training.placing import move_into_place, part_of, reason_of, remove, sync
from eetrain.training.processes import ALONE, Alone, Processes, TorchProcesses

__all__ = ["Alone", "CheckpointFolder", "Processes", "TorchProcesses", "is_checkpoint_folder", "save_folder"]

SHARD_BYTES = 2**30

T = TypeVar("T")
_Written = tuple[dict[str, FileRecord], dict[str, str]]


def save_folder(
    target: str | Path,
    tensors: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]],
    trainer_state: dict[str, Any],
    *,
    topology: Mapping[str, int],
    gradient_norms: Sequence[float | None] = (),
    processes: Processes = ALONE,
) -> None:
    """Write the checkpoint folder ``target``, whole or not at all; every process of the run calls this.

    It is written beside ``target``, flushed to the disk and then moved into its place, so that a kill at any moment
    leaves the checkpoint before or this one. If one process fails all of them raise, and none waits for another.

    Args:
        target: on a disk that all processes see; a checkpoint that is there is replaced.
        tensors: those that this process owns, under names that do not depend on the topology (see
            :mod:`~eetrain.training.checkpoint_manifest`); a name is given by one process only. An iterator is consumed
            to its end even after a failure, because making its tensors may be common work of the processes. About
            1 GB of them is held at a time.
        trainer_state: Lightning's checkpoint dict without tensors of the model; counts on rank 0 only.
        topology: what writes, such as ``{"stages": 2, "replicas": 1}``.
        gradient_norms: of its stages, see :class:`~eetrain.training.checkpoint_manifest.Manifest`.
        processes: all that write together.

    Raises:
        CheckpointError: on every process, with the reason of the first that failed: a full disk, data that cannot be
            stored or read again, a tensor given twice, a folder at ``target`` that is no checkpoint.
    """
    target = Path(target)
    staged, first = part_of(target), processes.rank == 0
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    try:
        _together(processes, target, lambda: _begin(target, staged) if first else None)
        shards = _together(processes, target, lambda: _write_shards(staged, processes.rank, pairs))
        finish = partial(_finish, target, staged, shards, trainer_state, topology, gradient_norms)
        _together(processes, target, lambda: finish() if first else None)
    finally:
        if first:
            remove(staged)


@dataclass
class _Shards:
    """Collects the tensors of one process and writes them as files of about :data:`SHARD_BYTES`."""

    folder: Path
    rank: int
    files: dict[str, FileRecord] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    _held: dict[str, Tensor] = field(default_factory=dict)
    _starts: set[int] = field(default_factory=set)
    _bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._bytes + tensor.nbytes > SHARD_BYTES:
            self.flush()
        if name in self.tensors:
            raise ValueError(f"the tensor {name!r} is given twice")
        plain = tensor.detach().cpu().contiguous()
        # Tied weights are one piece of memory under two names, which safetensors refuses.
        if plain.data_ptr() in self._starts:
            plain = plain.clone()
        self._starts.add(plain.data_ptr())
        self._held[name] = plain
        self._bytes += plain.nbytes
        self.tensors[name] = weights_file(self.rank, len(self.files))

    def flush(self) -> None:
        if not self._held:
            return
        path = self.folder / weights_file(self.rank, len(self.files))
        path.parent.mkdir(parents=True, exist_ok=True)  # a network disk may not show it yet
        save_file(self._held, path, metadata={"format": "pt"})
        sync(path)
        self.files[path.name] = FileRecord.of(path)
        self._held, self._starts, self._bytes = {}, set(), 0


def _together(processes: Processes, target: Path, step: Callable[[], T]) -> list[T | None]:
    """Do a step and hear how it went everywhere: the values of all, or an error on all."""
    value, reason, cause = None, None, None
    try:
        value = step()
    except Exception as error:  # whatever it is, the others must hear of it
        cause, reason = error, reason_of(error)
    results = processes.gather((value, reason))
    for rank, (_, failure) in enumerate(results):
        if failure is not None:
            raise unwritten(target, failure if len(results) == 1 else f"process {rank}: {failure}") from cause
    return [value for value, _ in results]


def _begin(target: Path, staged: Path) -> None:
    refuse_foreign_folder(target)
    remove(staged)
    staged.mkdir(parents=True)


def _write_shards(folder: Path, rank: int, pairs: Iterable[tuple[str, Tensor]]) -> _Written:
    shards, failure = _Shards(folder, rank), None
    for name, tensor in pairs:
        if failure is None:
            try:
                shards.add(name, tensor)
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure
    shards.flush()
    return shards.files, shards.tensors


def _finish(
    target: Path,
    staged: Path,
    written: list[_Written | None],
    trainer_state: dict[str, Any],
    topology: Mapping[str, int],
    gradient_norms: Sequence[float | None],
) -> None:
    files, tensors = _joined([part for part in written if part is not None])
    for name in files:
        if not (staged / name).is_file():
            raise FileNotFoundError(f"it does not see {name}; all processes must write to one disk")
    _write_trainer_state(staged / TRAINER_FILE, trainer_state)
    files[TRAINER_FILE] = FileRecord.of(staged / TRAINER_FILE)
    step = int(trainer_state.get("global_step", 0))
    Manifest(step, dict(topology), installed_versions(), files, tensors, list(gradient_norms)).write(staged)
    sync(staged)
    move_into_place(staged, target)


def _joined(written: list[_Written]) -> _Written:
    files: dict[str, FileRecord] = {}
    tensors: dict[str, str] = {}
    for own_files, own_tensors in written:
        if twice := tensors.keys() & own_tensors.keys():
            raise ValueError(f"the tensor {min(twice)!r} is given by two processes")
        files |= own_files
        tensors |= own_tensors
    return files, tensors


def _write_trainer_state(path: Path, state: dict[str, Any]) -> None:
    if state.get("state_dict"):
        raise ValueError("trainer_state holds weights of the model; they are given as tensors")
    with open(path, "wb") as file:  # through Python's file, whose errors carry the system's words
        torch.save({key: value for key, value in state.items() if key != "state_dict"}, file)
    sync(path)
    # What pickles may still be refused by the safe reader; then it had better be known now.
    torch.load(path, weights_only=True, map_location="cpu")
