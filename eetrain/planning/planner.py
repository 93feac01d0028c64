"""Make plans: for a given number of stages, or for every one that a cluster can have."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from eetrain.errors import TopologyError
from eetrain.exits import MultiExitModel
from eetrain.planning.activations import PieceActivations, saved_activations
from eetrain.planning.bubbles import cooldown_extras, warmup_extras, with_exits
from eetrain.planning.cluster import Cluster
from eetrain.planning.costs import PieceCost, piece_costs
from eetrain.planning.memory import Precision, TrainingState, stage_memory
from eetrain.planning.partition import partition
from eetrain.planning.plan import ExitCost, Filling, Layout, Plan, StagePlan, Workload
from eetrain.planning.schedule import Schedule, one_forward_one_backward
from eetrain.planning.simulation import StageTimes, Timeline, simulate
from eetrain.planning.timing import reduce_seconds, stage_times
from eetrain.planning.topology import Topology

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Planner:
    """Plans of one model, cluster and step.

    Args:
        costs: of the model's pieces.
        activations: of the same pieces.
        cluster: the devices.
        workload: the step.
        precision: of the model.
    """

    costs: tuple[PieceCost, ...]
    activations: tuple[PieceActivations, ...]
    cluster: Cluster
    workload: Workload
    precision: Precision = "bfloat16"

    @classmethod
    def of(
        cls,
        model: MultiExitModel,
        cluster: Cluster,
        workload: Workload,
        *,
        precision: Precision = "bfloat16",
        full_depth: bool = True,
    ) -> Planner:
        """Count a model from :func:`eetrain.planning.shapes.hollow_model`, made with the same settings."""
        costs = piece_costs(model, workload.length, full_depth=full_depth)
        return cls(costs, saved_activations(model, costs, workload.length), cluster, workload, precision)

    @property
    def num_blocks(self) -> int:
        """Of the backbone."""
        return sum(cost.piece.kind == "block" for cost in self.costs)

    def layouts(self) -> list[Layout]:
        """One for every possible number of stages, the best first.

        Those that fit into memory come first, the faster ones before the slower; then those that do not, by memory.

        Raises:
            TopologyError: no number of stages is possible.
        """
        devices = self.cluster.devices
        counts = [count for count in range(1, min(devices, self.num_blocks) + 1) if devices % count == 0]
        possible = [count for count in counts if self._micro_batches(devices // count) is not None]
        if not possible:
            raise self._indivisible(devices // counts[-1])

        def place(layout: Layout) -> tuple[bool, float]:
            return bool(layout.misfits), layout.peak_memory if layout.misfits else layout.step_seconds

        return sorted((self.layout(count) for count in possible), key=place)

    def layout(self, stages: int) -> Layout:
        """The best partition into so many stages.

        Raises:
            TopologyError: stages, devices, blocks and batch do not fit each other.
        """
        replicas = Topology.of(self.cluster.devices, stages, self.num_blocks).replicas
        micro_batches = self._micro_batches(replicas)
        if micro_batches is None:
            raise self._indivisible(replicas)
        bounds = self._bounds(self.costs, stages)
        timeline = self._simulate(one_forward_one_backward(stages, micro_batches), self._times(self.costs, bounds))
        return Layout(
            cluster=self.cluster,
            workload=self.workload,
            replicas=replicas,
            micro_batches=micro_batches,
            bounds=bounds,
            stages=self._stages(bounds, timeline, replicas),
            timeline=timeline,
            reduce_seconds=reduce_seconds(self.costs, bounds, self.cluster, self._state(replicas)),
            flops=float(self.workload.batch_size * sum(cost.flops for cost in self.costs)),
        )

    def plan(self, layout: Layout) -> Plan:
        """A layout with what its exits cost and, if asked for, extra micro-batches in its bubbles."""
        bare = [cost for cost in self.costs if cost.piece.kind != "exit"]
        bare_times = self._times(bare, self._bounds(bare, len(layout.stages)))
        return Plan(
            layout=layout,
            exits=self._exits(layout),
            plain_seconds=self._simulate(layout.timeline.schedule, bare_times).seconds,
            filling=self._filling(layout) if self.workload.fill else None,
        )

    def _micro_batches(self, replicas: int) -> int | None:
        """Of a replica, or ``None`` if the batch cannot be cut so."""
        count, rest = divmod(self.workload.batch_size, replicas * self.workload.micro_batch_size)
        return None if rest or not count else count

    def _indivisible(self, replicas: int) -> TopologyError:
        once = replicas * self.workload.micro_batch_size
        return TopologyError(
            f"batch_size={self.workload.batch_size} cannot be cut into micro-batches of "
            f"{self.workload.micro_batch_size} rows for {replicas} replicas of the pipeline.",
            hint=f"Set batch_size, the rows of one step over all replicas, to a multiple of {once}.",
        )

    def _bounds(self, costs: Sequence[PieceCost], stages: int) -> tuple[int, ...]:
        checkpointing = self.workload.checkpointing
        weights = [float(cost.step_flops(checkpointing=checkpointing)) for cost in costs]
        return partition([cost.piece for cost in costs], weights, stages)

    def _times(
        self, costs: Sequence[PieceCost], bounds: Sequence[int], without: Collection[int] = ()
    ) -> list[StageTimes]:
        rows, checkpointing = self.workload.micro_batch_size, self.workload.checkpointing
        return stage_times(costs, bounds, self.cluster, rows=rows, checkpointing=checkpointing, without=without)

    def _state(self, replicas: int) -> TrainingState:
        return TrainingState(self.precision, self.workload.zero_stage, replicas)

    def _simulate(self, schedule: Schedule, times: Sequence[StageTimes]) -> Timeline:
        send = self.cluster.transfer(self.workload.micro_batch_size * self.costs[0].output_bytes)
        return simulate(schedule, times, send_activation=send, send_gradient=send)

    def _filling(self, layout: Layout) -> Filling:
        """Extra micro-batches for the mean ratio of backward to forward, and the step with them."""
        times = [stage.times for stage in layout.stages]
        ratio = sum(own.heads + own.backward for own in times) / sum(own.forward for own in times)
        ends = {stage for stage, own in enumerate(layout.stages) if any("exit" in name for name in own.pieces)}
        warmup = with_exits(warmup_extras(len(times), ratio), ends)
        cooldown = cooldown_extras(len(times), ratio)
        schedule = one_forward_one_backward(len(times), layout.micro_batches, warmup=warmup, cooldown=cooldown)
        filled = self._simulate(schedule, times)
        extra = filled.seconds - layout.timeline.seconds
        return Filling(
            warmup=warmup,
            cooldown=cooldown,
            timeline=filled,
            extra_seconds=extra if extra > _ROUNDING * filled.seconds else 0.0,
            memory=tuple(own.memory.total for own in self._stages(layout.bounds, filled, layout.replicas)),
        )

    def _exits(self, layout: Layout) -> tuple[ExitCost, ...]:
        schedule, seconds = layout.timeline.schedule, layout.timeline.seconds
        found = []
        for stage, (start, end) in enumerate(pairwise(layout.bounds)):
            for cost in self.costs[start:end]:
                if cost.piece.kind == "exit":
                    less = self._times(self.costs, layout.bounds, without=[cost.piece.layer])
                    before = self._simulate(schedule, less).seconds
                    head = layout.stages[stage].times.heads - less[stage].heads
                    found.append(
                        ExitCost(cost.piece.layer, stage, head, seconds - before, 100 * (seconds / before - 1))
                    )
        return tuple(found)

    def _stages(self, bounds: Sequence[int], timeline: Timeline, replicas: int) -> tuple[StagePlan, ...]:
        times = self._times(self.costs, bounds)
        found = []
        for stage, (start, end) in enumerate(pairwise(bounds)):
            memory = stage_memory(
                self.costs[start:end],
                self.activations[start:end],
                state=self._state(replicas),
                rows=self.workload.micro_batch_size,
                length=self.workload.length,
                in_flight=timeline.in_flight[stage],
                checkpointing=self.workload.checkpointing,
            )
            found.append(
                StagePlan(
                    pieces=tuple(cost.piece.name for cost in self.costs[start:end]),
                    times=times[stage],
                    busy=timeline.busy[stage],
                    bubble=timeline.bubbles[stage] / timeline.seconds,
                    in_flight=timeline.in_flight[stage],
                    memory=memory,
                )
            )
        return tuple(found)
