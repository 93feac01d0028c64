"""What a pipeline would do on a cluster: partition, step time, bubbles, memory, and what each exit costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eetrain.planning.cluster import Cluster
from eetrain.planning.memory import StageMemory
from eetrain.planning.simulation import StageTimes, Timeline


@dataclass(frozen=True)
class Workload:
    """One optimizer step.

    Args:
        batch_size: rows of a step, over all replicas.
        length: tokens of a row.
        micro_batch_size: rows of a micro-batch.
        checkpointing: activation checkpointing of the blocks.
        zero_stage: 0 or 1.
        fill: run extra micro-batches in the bubbles.
    """

    batch_size: int
    length: int
    micro_batch_size: int = 1
    checkpointing: bool = False
    zero_stage: int = 1
    fill: bool = False


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        pieces: names of its pieces.
        times: seconds of a micro-batch.
        busy: seconds it computes in a step.
        bubble: share of the step in which it does not.
        in_flight: micro-batches whose activations it holds at one time.
        memory: bytes.
    """

    pieces: tuple[str, ...]
    times: StageTimes
    busy: float
    bubble: float
    in_flight: int
    memory: StageMemory


@dataclass(frozen=True)
class Layout:
    """A number of stages on a cluster, and what a step takes on them.

    Attributes:
        cluster: the devices.
        workload: the step.
        replicas: of the pipeline.
        micro_batches: of a step and replica.
        bounds: of the stages in the model's pieces.
        stages: each of them.
        timeline: of one step.
        reduce_seconds: for the sum of gradients after the pipeline.
        flops: of one step, all replicas, without what checkpointing runs again.
    """

    cluster: Cluster
    workload: Workload
    replicas: int
    micro_batches: int
    bounds: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    timeline: Timeline
    reduce_seconds: float
    flops: float

    @property
    def step_seconds(self) -> float:
        """Of the pipeline and the sum of gradients; the optimizer itself is not counted."""
        return self.timeline.seconds + self.reduce_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all replicas."""
        return self.workload.batch_size * self.workload.length / self.step_seconds

    @property
    def peak_share(self) -> float:
        """Share of the devices' peak that the step's FLOPs are: model FLOPs utilisation."""
        return self.flops / (self.step_seconds * self.cluster.flops * len(self.stages) * self.replicas)

    @property
    def peak_memory(self) -> float:
        """Bytes of the fullest stage."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def misfits(self) -> tuple[int, ...]:
        """Stages, from 0, that need more memory than a device has."""
        return tuple(place for place, own in enumerate(self.stages) if own.memory.total > self.cluster.memory)

    def summary(self) -> dict[str, Any]:
        """Its main numbers, as plain data."""
        return {
            "num_stages": len(self.stages),
            "replicas": self.replicas,
            "micro_batches": self.micro_batches,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "bubble": self.timeline.bubble_share,
            "peak_share": self.peak_share,
            "peak_memory": self.peak_memory,
            "misfits": list(self.misfits),
        }


@dataclass(frozen=True)
class ExitCost:
    """What one exit adds to the step, on the same stages: simulated with and without it.

    Attributes:
        layer: its block.
        stage: where it is, from 0.
        head_seconds: forward and backward of its head and loss, for one micro-batch.
        seconds: that the step takes longer.
        percent: of the step without it.
    """

    layer: int
    stage: int
    head_seconds: float
    seconds: float
    percent: float


@dataclass(frozen=True)
class Filling:
    """Extra micro-batches in the bubbles.

    Attributes:
        warmup: how many visit each stage forward and backward before its first backward.
        cooldown: how many each stage runs backward at the end; all run forward everywhere.
        timeline: of the step with them.
        extra_seconds: that it takes longer than without them; 0 if they fit.
        memory: bytes of each stage with them.
    """

    warmup: tuple[int, ...]
    cooldown: tuple[int, ...]
    timeline: Timeline
    extra_seconds: float
    memory: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the timeline's intervals."""
        return {
            "warmup": list(self.warmup),
            "cooldown": list(self.cooldown),
            "pipeline_seconds": self.timeline.seconds,
            "extra_seconds": self.extra_seconds,
            "bubble": self.timeline.bubble_share,
            "memory": list(self.memory),
        }


@dataclass(frozen=True)
class Plan:
    """A layout with what its exits cost and what its bubbles hold.

    Attributes:
        layout: stages and step.
        exits: what each costs on these stages.
        plain_seconds: of the pipeline without any exit, on the partition that is best then.
        filling: extra micro-batches, or ``None`` if they were not asked for.
    """

    layout: Layout
    exits: tuple[ExitCost, ...]
    plain_seconds: float
    filling: Filling | None

    @property
    def exits_percent(self) -> float:
        """What all exits together add to the pipeline's time, each partition at its best."""
        return 100 * (self.layout.timeline.seconds / self.plain_seconds - 1)

    @property
    def timeline(self) -> Timeline:
        """Of the step, with extra micro-batches if there are any."""
        return self.layout.timeline if self.filling is None else self.filling.timeline

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the timeline's intervals."""
        layout = self.layout
        stages = [{**asdict(own), "memory": {**asdict(own.memory), "total": own.memory.total}} for own in layout.stages]
        return {
            "cluster": asdict(layout.cluster),
            "workload": asdict(layout.workload),
            **layout.summary(),
            "pipeline_seconds": layout.timeline.seconds,
            "reduce_seconds": layout.reduce_seconds,
            "plain_seconds": self.plain_seconds,
            "exits_percent": self.exits_percent,
            "bounds": list(layout.bounds),
            "stages": stages,
            "exits": [asdict(own) for own in self.exits],
            "filling": None if self.filling is None else self.filling.to_dict(),
        }
