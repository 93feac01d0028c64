"""Checkpoint files that are either whole or not there."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from eetrain.errors import CheckpointError, EETrainError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to the disk, then rename over it.

    A crash, a kill or a full disk in between leaves the previous file whole. Unlike Lightning's own this keeps no
    second copy of the checkpoint in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written to.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write of its zip archive as RuntimeError.
            _discard(temporary)
            whole = " The previous checkpoint is whole." if target.exists() else ""
            raise CheckpointError(
                f"The checkpoint {target} could not be written: {_reason(error)}.{whole}",
                hint="Free space on that disk or set another folder with --run, then resume with --ckpt_path last.",
            ) from error
        except BaseException:
            _discard(temporary)
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed unless ``weights_only`` is false.

        Raises:
            CheckpointError: it is cut short, or holds more than tensors and plain data.
        """
        with reporting_unreadable(path):
            stored: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only is not False)
        return stored


@contextmanager
def reporting_unreadable(path: str | Path) -> Iterator[None]:
    """Turn what torch raises for a file that is cut short or not its own into a CheckpointError."""
    try:
        yield
    except (FileNotFoundError, EETrainError):
        raise
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="It is cut short or no checkpoint; use an older one of the run.",
        ) from error


def _discard(file: Path) -> None:
    with suppress(OSError):
        file.unlink()


def _reason(error: BaseException) -> str:
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error).splitlines()[0]
