"""Gates: whether a token leaves at an exit, from four statistics of the exit's distribution.

Source: JEI-DNN, Regol, Chataoui, Coates 2023 (arXiv 2310.09163, ICLR 2024).
Shape suffixes: ``N`` tokens, ``K`` cost weights, ``F`` gate inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from eetrain.errors import CheckpointError, ConfigError
from eetrain.exits.gating import FEATURES

MAX_COST_WEIGHT = 1000.0
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GateConfig:
    """Which gates the exits of a model have.

    Args:
        cost_weights: ``lambda`` of ``CE + lambda * cost``, cross-entropy in nats and cost 1 for the full depth. Every
            exit gets a gate for each, so that one checkpoint offers as many operating points; a larger one leaves
            earlier. In [0, 1000], each once.
        hidden: width of a hidden layer that the gates of an exit share; 0 for linear gates, as in the paper.
        position_length: gives gates the index of the generated token as a fifth input, divided by this and cut to
            [0, 1]; our addition.

    Raises:
        ConfigError: no cost weight, one named twice or out of its range, or a width or length out of its.
    """

    cost_weights: list[float]
    hidden: int = 0
    position_length: int | None = None

    def __post_init__(self) -> None:
        wrong = [weight for weight in self.cost_weights if not 0 <= weight <= MAX_COST_WEIGHT]
        twice = sorted({weight for weight in self.cost_weights if self.cost_weights.count(weight) > 1})
        if not self.cost_weights or wrong or twice:
            why = (
                f"{wrong[0]} is out of range" if wrong else f"{twice[0]} stands there twice" if twice else "it is empty"
            )
            raise ConfigError(
                f"exits.gates.cost_weights={list(self.cost_weights)}: {why}.",
                hint=f"Give numbers from 0 to {MAX_COST_WEIGHT:g}, each once; larger ones leave earlier. "
                "For example [0.3,1,3].",
            )
        if self.hidden < 0:
            raise ConfigError(
                f"exits.gates.hidden={self.hidden}.", hint="Set it to 0 for linear gates, or to a small width."
            )
        if self.position_length is not None and self.position_length < 1:
            raise ConfigError(
                f"exits.gates.position_length={self.position_length}.",
                hint="Set it to the usual length of generated texts in tokens, or leave it out.",
            )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GateConfig:
        """Read what ``dataclasses.asdict`` wrote.

        Raises:
            CheckpointError: a key this version does not know.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(
                f"The checkpoint's gates have settings this version does not know: {', '.join(unknown)}.",
                hint="Load it with the eetrain version that wrote it, or a newer one.",
            )
        return cls(**data)


def cost_name(weight: float) -> str:
    """A cost weight as it stands in names of metrics: ``0.3``, ``1``, ``10``."""
    short = f"{weight:g}"
    return short if float(short) == weight else repr(float(weight))


class Gate(nn.Module):
    """The gates of one exit, one for every cost weight: ``g_k = sigmoid(w_k . features + b_k)``.

    Output weights start at 0 and biases just below: an untrained gate lets no token leave, and only the data say where
    it goes first. Parameters stay in float32 when the model is cast to 16 bit, and are used without autocast: tokens
    that a gate must tell apart can differ by less than bfloat16 resolves.

    Args:
        config: cost weights, hidden width and position.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.position_length = config.position_length
        width = len(FEATURES) + (config.position_length is not None)
        self.inner = nn.Linear(width, config.hidden, dtype=torch.float32) if config.hidden else None
        self.output = nn.Linear(config.hidden or width, len(config.cost_weights), dtype=torch.float32)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, -0.1)

    def forward(self, features_N4: Tensor, index_N: Tensor | None = None) -> Tensor:
        """Logits ``[N, K]``; the gate's output is their sigmoid.

        Args:
            features_N4: from :func:`eetrain.exits.gating.gate_features` or ``stack_features``.
            index_N: index of the token among the generated ones, from 0; used only with ``position_length``.
        """
        inputs_NF = features_N4.to(self.output.weight.dtype)
        if self.position_length is not None:
            assert index_N is not None, "gates with position_length need the index of the token"
            position_N1 = (index_N[:, None].to(inputs_NF.dtype) / self.position_length).clamp(0, 1)
            inputs_NF = torch.cat([inputs_NF, position_N1], dim=-1)
        with torch.autocast(inputs_NF.device.type, enabled=False):
            hidden_NF = inputs_NF if self.inner is None else torch.relu(self.inner(inputs_NF))
            logits_NK: Tensor = self.output(hidden_NF)
        return logits_NK

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        def keeping_width(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # Not result.float(): that would keep the rounding.
            return tensor.to(result.device) if result.dtype in _NARROW else result

        for child in self.children():
            child._apply(keeping_width, recurse)  # type: ignore[no-untyped-call]
        return self
