"""Time of a generation, the prompt's pass apart from the tokens after it."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from eetrain.decoding import EarlyExitOutput, Policy

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


@dataclass(frozen=True)
class Timing:
    """Seconds of one or more generations.

    Attributes:
        prefill: from the call to each batch's first token.
        decode: from the first token to the last.
        ahead: tokens of a row that came together with its first, as drafts do that were accepted at once.
    """

    prefill: float = 0.0
    decode: float = 0.0
    ahead: int = 0

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.prefill + other.prefill, self.decode + other.decode, self.ahead + other.ahead)


class Clock:
    """A streamer that only looks at the clock, from its making on; a GPU has finished tokens that arrive on the CPU."""

    def __init__(self) -> None:
        self.times = [perf_counter()]
        self._ahead = 0

    def put(self, value: Tensor) -> None:
        """Note when the prompt, which comes first, or a token of every row was there."""
        self.times.append(perf_counter())
        if len(self.times) == 3 and value.dim() == 2:
            self._ahead = value.shape[1] - 1

    def end(self) -> None:
        """Nothing is buffered."""

    @property
    def timing(self) -> Timing:
        """Of the generation that this streamer was given to."""
        start, _, first, *_ = self.times
        return Timing(first - start, self.times[-1] - first, self._ahead)


def timed_generate(
    model: MultiExitModel, policy: str | Policy, input_ids: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[EarlyExitOutput, Timing]:
    """Generate and take the time.

    Args:
        model: with exits.
        policy: decides depths.
        input_ids: prompts ``[B, T]``, left-padded.
        attention_mask: ``[B, T]``.
        **options: as for ``generate``.
    """
    clock = Clock()
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        exit_policy=policy,
        return_dict_in_generate=True,
        streamer=clock,
        **options,
    )
    return output, clock.timing
