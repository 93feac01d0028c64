"""What gates learn: the cheapest exit of every token, and the loss that teaches gates to leave there.

Source: JEI-DNN, Regol, Chataoui, Coates 2023 (arXiv 2310.09163, ICLR 2024).
Shape suffixes: ``N`` tokens, ``E`` depths (exits ascending, then the full depth), ``G = E - 1`` gates,
``K`` cost weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eetrain.errors import ConfigError
from eetrain.exits.gates import Gate
from eetrain.exits.gating import stack_features
from eetrain.objectives.linear_ce import IGNORE_INDEX
from eetrain.objectives.token_statistics import TokenStatistics

ExitCosts = Literal["blocks"] | dict[int, float]


def parse_exit_costs(value: ExitCosts, exit_layers: Sequence[int], num_blocks: int) -> tuple[float, ...]:
    """Cost of every depth relative to the full one, the full depth's 1 last.

    Args:
        value: ``"blocks"`` for ``c_l = l / L``, or measured relative latencies by exit layer.
        exit_layers: the exits, ascending.
        num_blocks: ``L``.

    Raises:
        ConfigError: other layers than the model's exits, or costs that do not rise with depth within (0, 1].
    """
    if value == "blocks":
        return (*(layer / num_blocks for layer in exit_layers), 1.0)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"exit_costs is {value!r}.", hint="Use 'blocks', or a dict such as {3: 0.3, 6: 0.55} with every exit layer."
        )
    if sorted(value) != list(exit_layers):
        raise ConfigError(
            f"exit_costs names layers {sorted(value)}; the model's exits are at layers {list(exit_layers)}.",
            hint="Give the relative latency of every exit, and of no other layer.",
        )
    costs = tuple(float(value[layer]) for layer in exit_layers)
    rising = all(low < high for low, high in zip((0.0, *costs), costs, strict=False))
    if not rising or costs[-1] > 1:
        raise ConfigError(
            f"exit_costs is {dict(value)}; costs must be above 0, rise with depth and end at 1 or below.",
            hint="Divide each exit's latency by that of the full depth, or use 'blocks'.",
        )
    return (*costs, 1.0)


def optimal_exit(nll_EN: Tensor, costs_E: Tensor, cost_weights_K: Tensor) -> Tensor:
    """Place ``[N, K]`` of the cheapest depth, ``argmin_l CE_l + lambda_k c_l``; the shallowest of equals."""
    penalty_KE = cost_weights_K[:, None] * costs_E
    return (nll_EN.t()[:, None, :] + penalty_KE).argmin(-1)


def stop_targets(optimal_NK: Tensor, num_gates: int) -> Tensor:
    """What each gate should say, ``y_l = 1[l >= l*]``, ``[N, K, G]`` float32: 0 up to the optimal exit, then 1."""
    gates_G = torch.arange(num_gates, device=optimal_NK.device)
    return (gates_G >= optimal_NK[..., None]).float()


def class_balance(positive_KG: Tensor, num_tokens: Tensor) -> Tensor:
    """Weight of positive targets, ``#negative / #positive``; 1 where a class is absent and nothing can be balanced.

    Args:
        positive_KG: how many targets are 1, for each cost weight and gate.
        num_tokens: of how many tokens, a scalar.
    """
    negative_KG = num_tokens - positive_KG
    both_KG = (positive_KG > 0) & (negative_KG > 0)
    return torch.where(both_KG, negative_KG / positive_KG.clamp(min=1), torch.ones_like(positive_KG))


def gate_loss(
    logits_NKG: Tensor, targets_NKG: Tensor, num_tokens: Tensor | float, balance_KG: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy: sum over tokens, cost weights and gates, divided by their number; 0 without tokens.

    Args:
        logits_NKG: of the gates.
        targets_NKG: from :func:`stop_targets`.
        num_tokens: that the mean is over; more than ``N`` if other processes hold some of them.
        balance_KG: from :func:`class_balance`, or ``None``: classes count as they come.
    """
    targets_NKG = targets_NKG.to(logits_NKG.dtype)
    total = F.binary_cross_entropy_with_logits(logits_NKG, targets_NKG, pos_weight=balance_KG, reduction="sum")
    tokens = torch.as_tensor(num_tokens, device=total.device, dtype=total.dtype).clamp(min=1)
    return total / (tokens * math.prod(targets_NKG.shape[1:]))


def gate_logits(gates: Mapping[int, Gate], statistics: TokenStatistics, labels_N: Tensor) -> Tensor:
    """What all gates say about the tokens with a label, ``[N_valid, K, G]``, shallowest exit first.

    Args:
        gates: of every exit.
        statistics: all of them, ``[E, N]``; exits ascending, then rows without gates.
        labels_N: shifted labels.
    """
    valid_N = labels_N != IGNORE_INDEX
    features_EN4 = stack_features(statistics)[:, valid_N]
    index_N = predicted_index(labels_N)[valid_N]
    logits = [gates[layer](features_EN4[row], index_N) for row, layer in enumerate(sorted(gates))]
    return torch.stack(logits, dim=-1)


def predicted_index(labels_N: Tensor) -> Tensor:
    """Index within its generated text of the token that each position predicts: labels before it without a gap.

    In decoding this is 0 for the position that ends the prompt. A text starts anew after its prompt, with every packed
    document and with every row. Positions that predict nothing scored get -1.
    """
    places_N = torch.arange(len(labels_N), device=labels_N.device)
    valid_N = labels_N != IGNORE_INDEX
    if not len(labels_N):
        return places_N
    last_gap_N = torch.where(valid_N, torch.full_like(places_N, -1), places_N).cummax(0).values
    return places_N - last_gap_N - 1
