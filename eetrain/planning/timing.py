"""From what pieces compute to seconds of stages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from eetrain.planning.cluster import Cluster
from eetrain.planning.costs import PieceCost
from eetrain.planning.memory import TrainingState
from eetrain.planning.simulation import StageTimes


def stage_times(
    costs: Sequence[PieceCost],
    bounds: Sequence[int],
    cluster: Cluster,
    *,
    rows: int,
    checkpointing: bool = False,
    without: Collection[int] = (),
) -> list[StageTimes]:
    """Seconds of every stage for one micro-batch: FLOPs over what a device computes with.

    Args:
        costs: of all pieces.
        bounds: of the stages.
        cluster: speed of its devices.
        rows: of a micro-batch.
        checkpointing: blocks run forward again in their backward.
        without: exits that are left out.
    """
    scale = rows / cluster.speed
    found = []
    for start, end in pairwise(bounds):
        forward = heads = backward = 0
        for cost in costs[start:end]:
            if cost.piece.kind in ("block", "embed"):
                forward += cost.forward_flops
                backward += cost.step_flops(checkpointing=checkpointing) - cost.forward_flops
            elif cost.piece.kind == "tail" or cost.piece.layer not in without:
                heads += cost.flops
        found.append(StageTimes(forward * scale, heads * scale, backward * scale))
    return found


def reduce_seconds(costs: Sequence[PieceCost], bounds: Sequence[int], cluster: Cluster, state: TrainingState) -> float:
    """Seconds the slowest stage needs at the end of a step to sum gradients over replicas and over stages.

    Over the replicas every trained parameter of the stage; over the stages those it shares, a tied output matrix say.
    Nothing of it is taken to overlap with computing.
    """
    stages = [{weight for cost in costs[a:b] for weight in cost.weights if weight.trained} for a, b in pairwise(bounds)]
    seconds = []
    for own in stages:
        total = cluster.all_reduce(state.number_bytes * sum(weight.size for weight in own), state.replicas)
        for weight in own:
            users = sum(weight in other for other in stages)
            total += cluster.all_reduce(state.number_bytes * weight.size, users) if users > 1 else 0
        seconds.append(total)
    return max(seconds)
