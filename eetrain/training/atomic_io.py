"""Checkpoints that are either whole or not there, for runs of one process and for reading any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from eetrain.errors import ConfigError
from eetrain.training.checkpoint_fallback import whole_checkpoint
from eetrain.training.checkpoint_manifest import refuse_foreign_folder, unwritten
from eetrain.training.checkpoint_reading import CheckpointFolder, check_checkpoint, reporting_unreadable
from eetrain.training.placing import move_into_place, part_of, reason_of, remove, standing, sync, take_away
from eetrain.training.processes import present_processes


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes single files beside the target, flushed to the disk, then renamed over it; reads files and folders.

    A crash, a kill or a full disk in between leaves the previous file whole. Unlike Lightning's own this keeps no
    second copy of the checkpoint in memory.

    Args:
        resuming: what is read is to be trained on: in the place of a damaged checkpoint stands the newest whole one of
            its folder, and folders are refused, because only the strategies that write them restore their optimizer.
    """

    def __init__(self, *, resuming: bool = False) -> None:
        super().__init__()
        self.resuming = resuming

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written to.
        """
        target = Path(path)
        part = part_of(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            refuse_foreign_folder(target)
            with open(part, "wb") as file:  # through Python's file, whose errors carry the system's words
                torch.save(checkpoint, file)
            sync(part)
            move_into_place(part, target)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write of its zip archive as RuntimeError.
            raise unwritten(target, reason_of(error)) from error
        finally:
            remove(part)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed unless ``weights_only`` is false.

        Raises:
            CheckpointError: it is damaged, or holds more than tensors and plain data.
            ConfigError: a folder to be trained on.
        """
        if self.resuming:
            _refuse_folder(standing(Path(path)))  # before its files are read for their checksums
        path = self.locate(path)
        if self.resuming:
            _refuse_folder(path)
        if path.is_dir():
            return CheckpointFolder.open(path, check=False).checkpoint()
        with reporting_unreadable(path):
            stored: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only is not False)
        return stored

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a file or folder; a kill in the middle leaves nothing that looks like a checkpoint."""
        take_away(Path(path))

    def locate(self, path: str | Path) -> Path:
        """The whole checkpoint to read where ``path`` is asked for; all processes of the run call this.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            CheckpointError: it is damaged, and no other may or can take its place.
        """
        if self.resuming:
            return whole_checkpoint(path, present_processes())
        check_checkpoint(path, present_processes())
        return standing(Path(path))


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(
            f"{path} is a checkpoint folder, whose optimizer the strategy of this run cannot restore.",
            hint="Resume with the strategy it was trained with; on one process with a pipeline of one stage: "
            "-c configs/strategy/pipeline.yaml --trainer.strategy.init_args.stages 1.",
        )
