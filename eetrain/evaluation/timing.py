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
    """

    prefill: float = 0.0
    decode: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.prefill + other.prefill, self.decode + other.decode)


class _Clock:
    """A streamer that only looks at the clock; tokens arrive on the CPU, so a GPU has finished them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        """Nothing is buffered."""


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
    clock = _Clock()
    start = perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        exit_policy=policy,
        return_dict_in_generate=True,
        streamer=clock,
        **options,
    )
    # The first call brings the prompt, the second the first token.
    first, last = clock.times[1], clock.times[-1]
    return output, Timing(first - start, last - first)
