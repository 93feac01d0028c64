"""Parameters that take no part: ZeRO adds up norms group by group over the stages, and waits for those with fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn


def fill_groups(pipeline: nn.Module, groups: Iterable[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """A filler for every group of the optimizer that only other stages have; all processes take part.

    Args:
        pipeline: this process's stage, which the fillers become parameters of.
        groups: of this stage, with their names.

    Returns:
        The fillers, by names that put them into these groups.
    """
    own = {(group["name"], 2 if group["params"][0].dim() > 1 else 1) for group in groups}
    of_all: list[set[tuple[str, int]]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, own)
    missing = sorted(set().union(*of_all) - own)
    return {f"model.{part}.filler_{dim}": fill(pipeline, f"{part}_{dim}", dim) for part, dim in missing}


def fill(pipeline: nn.Module, name: str, dim: int) -> nn.Parameter:
    """A filler of ``dim`` dimensions with one zero, which becomes a parameter of ``pipeline``."""
    filler = nn.Parameter(next(pipeline.parameters()).new_zeros([1] * dim))
    pipeline.register_parameter(f"filler_{name}", filler)
    return filler
