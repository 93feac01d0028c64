"""The norm of the gradient that AdamW stepped with last, whatever an engine made of parameters and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eetrain.parallel.engine_state import flat_groups


class GradientNorm:
    """Measures the gradient of some parameters right before AdamW steps: complete, and clipped.

    Args:
        engine: DeepSpeed's, before its first step.
        parameters: trained ones of this process's stage.

    Attributes:
        sharded: whether replicas see parts of the gradient, which add up, instead of all of it.
    """

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter]) -> None:
        self.sharded = bool(flat_groups(engine))
        self._engine, self._step = engine, -1
        self._pieces = list(_pieces(engine, {id(parameter) for parameter in parameters}))
        self._square: Tensor | None = None
        engine.basic_optimizer.register_step_pre_hook(self._measure)

    def square(self) -> float | None:
        """The square of this process's part of the norm, in the last step that had one; ``None`` before."""
        if not self._pieces:
            return 0.0
        return None if self._square is None else float(self._square)

    def _measure(self, *_: object) -> None:
        found = [owner.grad[span] for owner, span in self._pieces if owner.grad is not None]
        if not found:
            return  # a step that is dropped, or in which these parameters rest
        # ZeRO steps group by group: what belongs to one step of the engine is added up.
        if self._square is None or self._step != self._engine.global_steps:
            self._square = torch.zeros((), dtype=torch.float64, device=self._engine.device)
            self._step = self._engine.global_steps
        self._square += torch.nn.utils.get_total_norm(found).double() ** 2


def total_norm(squares: Sequence[float | None]) -> float | None:
    """The norm of parts with these squares; ``None`` if one is unknown, or the norm not finite."""
    known = [square for square in squares if square is not None]
    norm = math.sqrt(sum(known)) if len(known) == len(squares) and all(map(math.isfinite, known)) else math.inf
    return norm if math.isfinite(norm) else None


def _pieces(engine: Any, wanted: set[int]) -> Iterator[tuple[Tensor, slice]]:
    """What AdamW steps, with the part of it that belongs to a wanted parameter."""
    groups = flat_groups(engine)
    if not groups:
        for group in engine.basic_optimizer.param_groups:
            yield from ((parameter, slice(None)) for parameter in group["params"] if id(parameter) in wanted)
    for parameters, flat in groups:
        for parameter in parameters:
            mapping = getattr(parameter, "_hp_mapping", None)
            if id(parameter) in wanted and mapping is not None:
                place = mapping.get_hp_fragment_address()
                yield flat, slice(place.start, place.start + place.numel)
