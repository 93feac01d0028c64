"""Going back to an earlier checkpoint of a running fit, while the data go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from eetrain.errors import CheckpointError
from eetrain.training.checkpoint_reading import check_checkpoint, read_trainer_state
from eetrain.training.gradients import OwnSteps
from eetrain.training.placing import standing_in
from eetrain.training.processes import Processes

Ours = Callable[[dict[str, Any]], bool]


def newest_whole(folder: Path, ours: Ours, processes: Processes) -> Path | None:
    """The whole checkpoint of most steps among those of this run; ``None`` if there is none.

    Args:
        folder: of the checkpoints.
        ours: tells by Lightning's checkpoint dict whether this run wrote it.
        processes: share the work and come to one answer; all of them call this.
    """
    # What the others see of a network disk counts for nothing: all must try the same ones in the same order.
    candidates = processes.gather(_candidates(folder, ours) if processes.rank == 0 else [])[0]
    return next((path for path in candidates if _is_whole(path, processes)), None)


def rewind(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Put weights, moments, learning rates, precision state and the step count back; all processes call this.

    To be called in ``on_train_batch_end``. Progress in the data stays, and with it the dropout of every batch to come,
    which is drawn by the number of batches seen.

    Args:
        trainer: in a fit.
        path: a whole checkpoint that this fit, or the one it goes on from, has written.

    Returns:
        Lightning's checkpoint dict.
    """
    strategy, precision = trainer.strategy, trainer.precision_plugin
    checkpoint: dict[str, Any] = strategy.load_checkpoint(path)
    # Engines restore weights together with their masters. A frozen backbone may be left out, and has not changed.
    if not isinstance(strategy, OwnSteps):
        strategy.load_model_state_dict(checkpoint, strict=False)
    strategy.load_optimizer_state_dict(checkpoint)
    for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    if (state := checkpoint.get(type(precision).__qualname__)) is not None:
        precision.load_state_dict(state)
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    steps.total.ready = steps.total.completed = int(checkpoint["global_step"])
    return checkpoint


def _candidates(folder: Path, ours: Ours) -> list[Path]:
    found = []
    for path in standing_in(folder, ".ckpt"):
        try:
            state = read_trainer_state(path)
        except (CheckpointError, FileNotFoundError):
            continue
        if "optimizer_states" in state and ours(state):
            found.append((int(state["global_step"]), path.stat().st_mtime, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _is_whole(path: Path, processes: Processes) -> bool:
    try:
        check_checkpoint(path, processes)
    except CheckpointError:
        return False
    return True
