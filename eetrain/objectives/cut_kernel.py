"""Optional cut-cross-entropy GPU kernels behind :func:`~linear_cross_entropy`.

They hold no logits at all and are faster, but know neither statistics nor biases nor scaled logits, and sum
the gradient of a 16-bit matrix in 16 bit. So they are used when asked for, never because they are installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eetrain.backbones.projection import Projection
from eetrain.errors import ConfigError


def obstacle(
    hidden: Sequence[Tensor],
    projections: Sequence[Projection],
    token_weights: object,
    statistics: str,
    *,
    distils: bool,
) -> tuple[str, str] | None:
    """Why the kernels cannot do this call, and what to do about it; ``None`` if they can."""
    use_torch = "set kernel='torch'."
    if statistics != "none":
        return f"it computes no token statistics (statistics={statistics!r})", use_torch
    if callable(token_weights):
        return "it cannot weight tokens by their own confidence", use_torch
    if distils:
        return "it knows labels only, and exits are distilled from the full depth", use_torch
    if any(head.scale != 1.0 for head in projections):
        return "it cannot scale logits, and this model does", use_torch
    if any(head.bias is not None for head in projections):
        return "it knows no bias, and a head has one", use_torch
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return "the package cut-cross-entropy is not installed", "pip install 'eetrain[cce]'."
    devices = sorted({states.device.type for states in hidden})
    if devices != ["cuda"]:
        return f"it needs a CUDA device and the tensors are on {', '.join(devices)}", use_torch
    return None


def require_usable(
    hidden: Sequence[Tensor],
    projections: Sequence[Projection],
    token_weights: object,
    statistics: str,
    *,
    distils: bool,
) -> None:
    """Raise ConfigError if the kernels cannot do this call."""
    found = obstacle(hidden, projections, token_weights, statistics, distils=distils)
    if found is not None:
        raise ConfigError(f"kernel='cce' was asked for, but {found[0]}.", hint=found[1])


def losses(
    hidden: Sequence[Tensor],
    projections: Sequence[Projection],
    labels: Tensor,
    exit_weights: Sequence[float],
    token_weights: Tensor | Callable[..., Tensor] | None,
    ignore_index: int,
    impl: str = "cce",
) -> tuple[Tensor, Tensor]:
    """Weighted loss without normalizer (differentiable) and each exit's plain sum of losses ``[E]``.

    The kernels' filter, which drops small gradients, is off. ``impl="torch_compile"`` is the package's own
    reference and runs on a CPU.
    """
    import cut_cross_entropy

    total = torch.zeros((), device=labels.device)
    sums = []
    for index, (states_ND, head) in enumerate(zip(hidden, projections, strict=True)):
        options: dict[str, Any] = {"ignore_index": ignore_index, "softcap": head.softcap, "reduction": "none"}
        states_ND, matrix_VD = _same_dtype(states_ND, head.weight)
        nll_N = cut_cross_entropy.linear_cross_entropy(
            states_ND, matrix_VD, labels, filter_eps=None, impl=impl, **options
        ).float()
        sums.append(nll_N.detach().sum())
        if isinstance(token_weights, Tensor):
            weights_EN = token_weights.detach().expand(len(hidden), len(labels))
            nll_N = nll_N * weights_EN[index]
        total = total + exit_weights[index] * nll_N.sum()
    return total, torch.stack(sums)


def _same_dtype(states_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    device = weight_VD.device.type
    on = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if on else weight_VD.dtype
    return states_ND.to(dtype), weight_VD.to(dtype)
