"""Learning rates of a model whose parts are on several processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn


def peak_rates(groups: Iterable[Mapping[str, Any]], fillers: Iterable[nn.Parameter]) -> dict[str, float]:
    """Peak learning rates by part of the model: no stage has groups of all parts, so all processes take part.

    Args:
        groups: of this process's optimizers.
        fillers: parameters that are there for the engine's sake; a group of these alone does not count.
    """
    idle = set(map(id, fillers))
    real = [group for group in groups if any(id(parameter) not in idle for parameter in group["params"])]
    found: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, {group["name"]: group["initial_lr"] for group in real})
    return {part: rate for rates in found for part, rate in sorted(rates.items())}
