"""What was wrong with a step, in words: which loss terms or parameters, in which batch, on which processes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer

from eetrain.data.resume import ResumableDataLoader

_MOST_NAMES, _MOST_ROWS = 3, 16


@dataclass(frozen=True)
class Place:
    """Where the batches of a step stand in the data, as one process sees it.

    Args:
        epoch: that they are of.
        batches: their numbers in the epoch, from 0.
        rows: of the training data in them; ``None`` if the loader does not tell.
    """

    epoch: int
    batches: tuple[int, ...]
    rows: tuple[int, ...] | None

    @classmethod
    def of_present(cls, trainer: Trainer, back: Sequence[int] = (0,)) -> Place:
        """Batches of the step that is about to be made; to be asked in ``on_before_optimizer_step``.

        Args:
            trainer: of the fit.
            back: how many batches before the present one each is.
        """
        loader = trainer.train_dataloader
        if not isinstance(loader, ResumableDataLoader) or loader.position is None:
            present = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
            return cls(trainer.current_epoch, tuple(present - number for number in back), None)
        position, sampler, rows = loader.position(), copy.copy(loader.resumable_sampler), []
        numbers = tuple(position.batches - number for number in back)
        for number in numbers:
            sampler.seek(position.epoch, number)
            rows += next(iter(sampler))
        return cls(position.epoch, numbers, tuple(rows))


@dataclass(frozen=True)
class Finding:
    """What one process found of a step that is not to be made.

    Args:
        place: of the batches in question.
        terms: of the loss that are not finite here.
        parameters: whose gradients are not finite here.
    """

    place: Place
    terms: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


def where(findings: Sequence[Finding]) -> str:
    """Epoch, batches, and rows by rank: of the processes with a bad loss if there are some, else of all.

    Args:
        findings: of all processes, by rank.
    """
    first = findings[0].place
    numbers = [first.batches[0]] if len(first.batches) == 1 else [first.batches[0], first.batches[-1]]
    text = f"epoch {first.epoch}, batch{'es' if len(numbers) > 1 else ''} {' to '.join(map(str, numbers))}"
    guilty = [rank for rank, finding in enumerate(findings) if finding.terms] or list(range(len(findings)))
    of_ranks = [f"on rank {rank}{_rows(findings[rank].place)}" for rank in guilty]
    return f"{text}; {'; '.join(of_ranks)}"


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _rows(place: Place) -> str:
    if place.rows is None:
        return ""
    more = len(place.rows) - _MOST_ROWS
    return f" rows {', '.join(map(str, place.rows[:_MOST_ROWS]))}" + (f" and {more} more" if more > 0 else "")
