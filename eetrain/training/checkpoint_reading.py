"""Reading a run's checkpoints, folders and single files, on any number of processes."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eetrain.errors import CheckpointError, EETrainError
from eetrain.training.checkpoint_manifest import (
    DAMAGED_HINT,
    OPTIMIZER_PREFIX,
    TRAINER_FILE,
    Manifest,
    damaged,
)
from eetrain.training.placing import reason_of, standing
from eetrain.training.processes import ALONE, Processes

# What zipfile and torch raise for bytes that make no sense.
_UNREADABLE = (
    *(OSError, RuntimeError, ValueError, EOFError, KeyError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error),
)


class CheckpointFolder:
    """A checkpoint folder opened for reading; tensors are read when they are asked for.

    Attributes:
        path: where it stands.
        names: of all tensors.
        topology: what wrote it, such as ``{"stages": 2, "replicas": 1}``.
        global_step: optimizer steps done.
        manifest: what it holds in which file.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.names = frozenset(manifest.tensors)
        self.topology = manifest.topology
        self.global_step = manifest.global_step
        self._files = manifest.tensors
        self._opened: dict[str, Any] = {}

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True, processes: Processes = ALONE) -> CheckpointFolder:
        """Open the folder at ``path``, or what stands beside it if a kill came while it was replaced.

        Args:
            path: of the folder.
            check: compare every file with the size and checksum it was written with.
            processes: share the check among them; all of them call this, and all hear of what one finds.

        Raises:
            CheckpointError: it is no checkpoint folder, or damaged; names the files.
        """
        folder = standing(Path(path))
        manifest, failure = _manifest_of(folder)
        failures = processes.gather(failure)
        for error in failures:
            if error is not None:
                raise error
        assert manifest is not None
        if check:
            shares = processes.gather(_damage(folder, manifest, processes.rank, len(failures)))
            if problems := {name: problem for share in shares for name, problem in share.items()}:
                raise damaged(folder, list(problems.values()), problems)
        return cls(folder, manifest)

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: there is none of that name, or its file cannot be read.
        """
        tensor: Tensor = self._read(name, lambda file: file.get_tensor(name))
        return tensor

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.path} holds no tensor {name!r}.",
                hint="It was written by a run with another model or optimizer; resume with the settings of that run.",
            )
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(self.path / file, framework="pt", device="cpu")
            return read(self._opened[file])
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, [f"{file} cannot be read ({reason_of(error)})"]) from error

    def state_dict(self, wanted: Container[str] | None = None) -> dict[str, Tensor]:
        """The tensors of the model, under the names of the LightningModule.

        Args:
            wanted: names that are read; the others get a tensor on the meta device. All by default.
        """
        names = [name for name in self._files if not name.startswith(OPTIMIZER_PREFIX)]
        return {name: self.tensor(name) if wanted is None or name in wanted else self.hollow(name) for name in names}

    def hollow(self, name: str) -> Tensor:
        """A tensor's shape, on the meta device.

        Raises:
            CheckpointError: as for :meth:`tensor`.
        """
        return torch.empty(self._read(name, lambda file: file.get_slice(name).get_shape()), device="meta")

    def checkpoint(self) -> dict[str, Any]:
        """Lightning's checkpoint dict, as a run of one process would have written it, without optimizer states."""
        return {**self.trainer_state(), "state_dict": self.state_dict()}

    def trainer_state(self) -> dict[str, Any]:
        """Lightning's checkpoint dict without tensors of the model; nothing in it is executed."""
        with reporting_unreadable(self.path / TRAINER_FILE):
            state: dict[str, Any] = torch.load(self.path / TRAINER_FILE, map_location="cpu", weights_only=True)
        return state


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A run's checkpoint, folder or single file, as Lightning's dict with ``state_dict``; checked, nothing executed.

    The tensors stay on the disk until they are used.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        CheckpointError: it is damaged, or holds more than tensors and plain data.
    """
    check_checkpoint(path)
    path = standing(Path(path))
    return CheckpointFolder.open(path, check=False).checkpoint() if path.is_dir() else _load_file(path)


def read_trainer_state(path: str | Path) -> dict[str, Any]:
    """Settings and progress of a run's checkpoint, without a check of its tensors.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = standing(Path(path))
    return CheckpointFolder.open(path, check=False).trainer_state() if path.is_dir() else _load_file(path)


def check_checkpoint(path: str | Path, processes: Processes = ALONE) -> None:
    """Read all of a checkpoint, folder or single file, and compare it with the checksums it was written with.

    A single file is a zip archive whose members bear CRC-32 sums, which torch writes but does not compare.

    Args:
        path: of the checkpoint.
        processes: share the work and hear of what one finds; all of them call this.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        CheckpointError: it is cut short or changed, or no checkpoint.
    """
    path = standing(Path(path))
    if not all(processes.gather(path.exists())):
        raise FileNotFoundError(f"Checkpoint file not found: {path}")
    if path.is_dir():
        CheckpointFolder.open(path, processes=processes)
        return
    problem = processes.gather(_problem_of_file(path) if processes.rank == 0 else None)[0]
    if problem is not None:
        raise problem


@contextmanager
def reporting_unreadable(path: str | Path) -> Iterator[None]:
    """Turn what is raised for a file that is cut short or no checkpoint into a CheckpointError."""
    try:
        yield
    except (FileNotFoundError, EETrainError):
        raise
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason_of(error)}",
            hint="It is cut short or no checkpoint; use an older one of the run.",
        ) from error


def _load_file(path: Path) -> dict[str, Any]:
    with reporting_unreadable(path):
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return stored


def _problem_of_file(path: Path) -> CheckpointError | None:
    try:
        with reporting_unreadable(path), zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except CheckpointError as error:
        return error
    if changed is None:
        return None
    return CheckpointError(f"{path} is damaged: {changed} in it is not what was written.", hint=DAMAGED_HINT)


def _manifest_of(folder: Path) -> tuple[Manifest | None, CheckpointError | None]:
    try:
        return Manifest.read(folder), None
    except CheckpointError as error:
        return None, error


def _damage(folder: Path, manifest: Manifest, rank: int, count: int) -> dict[str, str]:
    """What is wrong with every ``count``-th file, beginning with the ``rank``-th, by name."""
    share = sorted(manifest.files.items())[rank::count]
    return {name: problem for name, record in share if (problem := record.damage(folder / name)) is not None}
