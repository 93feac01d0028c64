"""The format of a checkpoint folder: its files, and the manifest that vouches for them.

::

    last.ckpt/
        weights-00-00.safetensors   tensors that process 0 gave, 01 those of process 1, ...; up to 1 GB each
        trainer.pt                  Lightning's dict without tensors of the model; read with weights_only=True
        manifest.json               below; written last

Tensors bear names that say nothing of stages or replicas: those of the LightningModule's state dict
(``model.backbone....``, ``model.exits....``, ``model.gates....``), and ``optimizer/KEY/NAME`` for what the optimizer
keeps of parameter ``NAME``, with ``KEY`` one of ``exp_avg``, ``exp_avg_sq``, ``step`` and ``master`` (the float32
weight, where the model's is shorter).
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eetrain.errors import CheckpointError
from eetrain.training.placing import standing, sync

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TRAINER_FILE = "trainer.pt"
OPTIMIZER_PREFIX = "optimizer/"
DAMAGED_HINT = "Use an older checkpoint of the run."


class DamagedFolderError(CheckpointError):
    """A checkpoint folder is not what was written.

    Attributes:
        files: names of its files that are not, if its manifest tells.
    """

    def __init__(self, message: str, *, hint: str = "", files: Collection[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.files = frozenset(files)


def weights_file(rank: int, number: int) -> str:
    """Name of the ``number``-th file of tensors of process ``rank``."""
    return f"weights-{rank:02d}-{number:02d}.safetensors"


def writer_of(file: str) -> int | None:
    """The process that gave the tensors of a file; ``None`` for files of no tensors."""
    parts = file.removesuffix(".safetensors").split("-")
    return int(parts[1]) if parts[0] == "weights" else None


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its SHA-256."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Measure a file."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(file.tell(), digest)

    def damage(self, path: Path) -> str | None:
        """What is wrong with the file at ``path``; ``None`` if it is as recorded."""
        try:
            found = path.stat().st_size
            if found != self.size:
                return f"{path.name} has {found:,} bytes instead of {self.size:,}"
            same = FileRecord.of(path) == self
        except FileNotFoundError:
            return f"{path.name} is missing"
        except OSError as error:
            return f"{path.name} cannot be read ({error.strerror})"
        return None if same else f"{path.name} is not what was written (its checksum differs)"


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` holds, itself under a checksum.

    Args:
        global_step: optimizer steps done.
        topology: what wrote it, such as ``{"stages": 2, "replicas": 1}``.
        versions: of eetrain and its libraries.
        files: every other file.
        tensors: every tensor's file.
        gradient_norms: of a pipeline's stages, the L2 norm of the last step's gradient of its blocks, clipped; ``None``
            where it is not known or not finite, nothing if no pipeline wrote it.
    """

    global_step: int
    topology: dict[str, int]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    tensors: dict[str, str]
    gradient_norms: list[float | None] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write it into ``folder`` and flush it to the disk."""
        content = {"format": FORMAT, **asdict(self)}
        if not self.gradient_norms:
            del content["gradient_norms"]  # what needs none is as versions that know of none wrote it
        path = folder / MANIFEST_FILE
        path.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n", encoding="utf-8")
        sync(path)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read that of ``folder``.

        Raises:
            CheckpointError: it is missing, damaged, or of a format this version does not know.
        """
        path = folder / MANIFEST_FILE
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            whole = content.pop("sha256") == _digest(content)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise damaged(folder, [f"{MANIFEST_FILE} is missing"]) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(folder, [f"{MANIFEST_FILE} cannot be read"]) from error
        if not whole:
            raise damaged(folder, [f"{MANIFEST_FILE} is not what was written (its checksum differs)"])
        if (found := content.pop("format")) != FORMAT:
            raise CheckpointError(
                f"{folder} has format {found}; this version of eetrain reads {FORMAT}.",
                hint="Read it with the eetrain that wrote it.",
            )
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        return cls(files=files, **content)


def is_checkpoint_folder(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint in this form, be it a damaged one; false for a checkpoint of one file."""
    folder = standing(Path(path))
    return any((folder / name).is_file() for name in (MANIFEST_FILE, TRAINER_FILE))


def refuse_foreign_folder(target: Path) -> None:
    """Check that no checkpoint written to ``target`` deletes a folder that is something else.

    Raises:
        IsADirectoryError: it would.
    """
    if target.is_dir() and not is_checkpoint_folder(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def unwritten(target: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that could not be written."""
    whole = " The previous checkpoint is whole." if target.is_file() or is_checkpoint_folder(target) else ""
    return CheckpointError(
        f"The checkpoint {target} could not be written: {reason}.{whole}",
        hint="If it is the disk, free space or set another folder with --run; then go on with --resume auto.",
    )


def damaged(folder: Path, problems: list[str], files: Collection[str] = ()) -> DamagedFolderError:
    """The error for a folder with something wrong in it, in these files of it."""
    return DamagedFolderError(f"{folder} is damaged: {'; '.join(problems)}.", hint=DAMAGED_HINT, files=files)


def installed_versions() -> dict[str, str]:
    """Versions of what reads and writes checkpoints."""
    found: dict[str, str] = {}
    for name in ("eetrain", "torch", "lightning", "safetensors"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
