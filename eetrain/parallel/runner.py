"""Batches through a pipeline: cut into micro-batches, trained on or scored, totals added up over all processes.

Shape suffixes: ``B`` rows, ``T`` positions, ``N = B * T`` tokens, ``E`` depths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from eetrain.exits import MultiExitModel
from eetrain.objectives import FULL, JointGating, Objective
from eetrain.objectives.linear_ce import IGNORE_INDEX, shift_labels
from eetrain.objectives.objective import depth_name
from eetrain.objectives.token_statistics import TokenStatistics
from eetrain.objectives.weighted_sum import WeightedSum, distance_name
from eetrain.parallel.pipeline import ExitPipeline
from eetrain.parallel.stage import MicroBatch
from eetrain.parallel.tasks import Scores, SharedLosses, Sums, WeightedLosses
from eetrain.planning.topology import Topology, check_micro_batches
from eetrain.training.step_terms import TOTAL, StepTerms

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scored:
    """A replica's batch as all its depths see it, the same on every stage.

    Args:
        statistics: ``[E, N]``.
        layers: the layer of each row: exits ascending, then the full depth.
        labels_N: shifted labels.
    """

    statistics: TokenStatistics
    layers: tuple[int, ...]
    labels_N: Tensor


class PipelineRunner:
    """Runs one process's part of every batch.

    Args:
        pipeline: this process's stage.
        engine: DeepSpeed's, around ``pipeline``.
        objective: bound to the model.
        topology: stages and replicas.
        micro_batches: of a training step and replica.
    """

    def __init__(
        self, pipeline: ExitPipeline, engine: Any, objective: Objective, topology: Topology, micro_batches: int
    ) -> None:
        self.pipeline, self.engine, self.objective = pipeline, engine, objective
        self.topology, self.micro_batches = topology, micro_batches
        pipeline.stage.reach_all = objective.unreached == "zero"
        self._shape: tuple[object, ...] = ()
        self._resting: list[nn.Parameter] = []
        if engine.basic_optimizer is not None:
            engine.basic_optimizer.register_step_pre_hook(self._let_rest)
        if not objective.needs_full_depth():
            pipeline.stage.last_trained_block = max(objective.exit_layers, default=0)

    def train(
        self,
        batch: Batch,
        step: int,
        active_LBT: Tensor | None = None,
        *,
        before_step: Callable[[StepTerms], None] = lambda terms: None,
    ) -> None:
        """One optimizer step of all that is not a gate: forward, backward, update.

        Args:
            batch: of this replica, the same on all its stages.
            step: optimizer step, counted from 0.
            active_LBT: where each block runs, or ``None`` for everywhere.
            before_step: called with the step's loss when all gradients of this stage are there and nothing has been
                done with them.
        """
        check_micro_batches(self.micro_batches, len(batch["input_ids"]))
        num_tokens = self.over_replicas(_num_scored(batch))
        task = self._task(step, num_tokens)
        self._begin(batch, task, self.micro_batches, active_LBT, travels=task.travels)
        self.pipeline.on_gradients = lambda: before_step(self._finish_gradients(task))
        self.engine.train_batch(self._feed())

    @torch.no_grad()
    def score(self, batch: Batch, active_LBT: Tensor | None = None) -> Scored:
        """All statistics of every depth, without autograd; every process of the replica gets all of them.

        Args:
            batch: of this replica; any number of rows.
            active_LBT: as for :meth:`train`.
        """
        rows = len(batch["input_ids"])
        count = min(self.micro_batches, rows)
        batch, active_LBT = _filled(batch, active_LBT, -rows % count)
        task = Scores()
        self._begin(batch, task, count, active_LBT, travels=task.travels)
        self.engine.eval_batch(self._feed(), num_micro_batches=count)
        labels_N = shift_labels(batch["labels"])
        depths = self._depths
        kept = rows * batch["input_ids"].shape[1]
        return Scored(_slice(self._gathered(task, depths, len(labels_N)), kept), depths, labels_N[:kept])

    def over_replicas(self, total: Tensor) -> Tensor:
        """The sum over all replicas of what all stages of a replica hold alike."""
        if self.topology.replicas == 1:
            return total
        total = total.clone()
        dist.all_reduce(total, group=self.engine.grid.get_data_parallel_group())
        return total

    @property
    def model(self) -> MultiExitModel:
        """The model, in which other stages' parameters are hollow."""
        return self.pipeline.stage.model

    @property
    def _depths(self) -> tuple[int, ...]:
        return (*self.model.exit_layers, FULL)

    def _task(self, step: int, num_tokens: Tensor) -> WeightedLosses | SharedLosses:
        weights, scale = self.objective.depth_weights(step), float(self.topology.replicas)
        if weights is not None:
            of_sum = self.objective if isinstance(self.objective, WeightedSum) else None
            if of_sum is None:
                return WeightedLosses(weights, None, "torch", num_tokens, scale)
            settings = of_sum.token_weights, of_sum.kernel
            return WeightedLosses(weights, *settings, num_tokens, scale, of_sum.distillation)
        assert isinstance(self.objective, JointGating)
        return SharedLosses(self.model.gates_by_layer(), self.objective.num_cost_weights, num_tokens, scale)

    def _trained_depths(self, task: WeightedLosses | SharedLosses) -> tuple[int, ...]:
        return tuple(task.weights) if isinstance(task, WeightedLosses) else self._depths

    def _begin(self, batch: Batch, task: Any, micro_batches: int, active_LBT: Tensor | None, *, travels: bool) -> None:
        work = self.pipeline.work
        work.task, work.micros = task, _cut(batch, micro_batches, active_LBT)
        self.pipeline.stage.renew()
        shape = (*work.micros[0].input_ids.shape, travels)
        if shape != self._shape:
            self._shape = shape
            self.engine.reset_activation_shape()

    def _feed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the engine reads on the first and the last stage; the layers have the micro-batches themselves."""
        micros = list(self.pipeline.work.micros)
        return ((micro.input_ids, micro.labels_N) for micro in micros)

    def _finish_gradients(self, task: WeightedLosses | SharedLosses) -> StepTerms:
        self._resting = self._out_of_reach()
        for tie in self.pipeline.ties:
            if tie.parameter.grad is None:
                tie.parameter.grad = torch.zeros_like(tie.parameter)
        loss, nll, divergence = self._totals(task.sums, task.num_tokens)
        means = {f"ce/{depth_name(depth)}": nll[depth] for depth in self._depths if depth in self._trained_depths(task)}
        if isinstance(task, WeightedLosses):
            exits = {depth: weight for depth, weight in task.weights.items() if depth != FULL}
            means |= {f"weight/{depth_name(d)}": loss.new_tensor(w) for d, w in exits.items()}
            if task.distillation is not None:
                means |= {distance_name(depth): divergence[depth] for depth in exits}
        else:
            unweighted = sum(nll.values(), loss.new_zeros(()))
            if loss > 0:
                self._scale_gradients(unweighted / loss)
            loss = unweighted
        local = {f"ce/{depth_name(depth)}": total for depth, total in task.sums.nll.items()}
        local |= {distance_name(depth): total for depth, total in task.sums.divergence.items()}
        here = {} if task.sums.loss is None else {TOTAL: task.sums.loss}
        return StepTerms({TOTAL: loss.float(), **means}, {**here, **local})

    def _out_of_reach(self) -> list[nn.Parameter]:
        """Trained parameters of blocks that ran nowhere in this step, on no replica."""
        if self.objective.unreached != "blocks rest":
            return []
        tied = {id(tie.parameter) for tie in self.pipeline.ties}
        trained = [p for p in self.pipeline.parameters() if p.requires_grad and id(p) not in tied]
        reached = torch.tensor([p.grad is not None for p in trained], device=self.engine.device, dtype=torch.int32)
        return [p for p, count in zip(trained, self.over_replicas(reached).tolist(), strict=True) if not count]

    def _let_rest(self, *_: object) -> None:
        # The engine has given them gradients of zero, with which AdamW would decay weights and moments.
        for parameter in self._resting:
            parameter.grad = None

    def _scale_gradients(self, factor: Tensor) -> None:
        for parameter in self.pipeline.parameters():
            # DeepSpeed's bfloat16 optimizer sums gradients up in float32, beside the parameter.
            grad = parameter._hp_grad if self.engine.using_bf16_optimizer else parameter.grad
            if grad is not None:
                grad.mul_(factor.to(grad.dtype))

    def _totals(self, sums: Sums, num_tokens: Tensor) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """The loss, every depth's mean cross-entropy and divergence, over all stages and replicas."""
        depths = self._depths
        like = torch.zeros((), dtype=torch.float64, device=num_tokens.device)
        values = [sums.loss, *(by_depth.get(depth) for by_depth in (sums.nll, sums.divergence) for depth in depths)]
        total = torch.stack([like if value is None else value.to(like) for value in values])
        dist.all_reduce(total)
        total[1:] /= num_tokens.clamp(min=1)
        nll, divergence = total[1:].view(2, -1)
        return total[0], dict(zip(depths, nll, strict=True)), dict(zip(depths, divergence, strict=True))

    def _gathered(self, task: Scores, depths: Sequence[int], num_tokens: int) -> TokenStatistics:
        """Statistics of all stages; each fills in its rows, and the sum is over one of them and zeros."""
        parts = []
        for field in fields(TokenStatistics):
            dtype = torch.int64 if field.name == "prediction" else torch.float32
            values_EN = torch.zeros(len(depths), num_tokens, dtype=dtype, device=self.engine.device)
            for row, depth in enumerate(depths):
                if depth in task.found:
                    values_EN[row] = torch.cat([getattr(found, field.name)[0] for found in task.found[depth]])
            if self.topology.stages > 1:
                dist.all_reduce(values_EN, group=self.engine.grid.get_pipe_parallel_group())
            parts.append(values_EN)
        return TokenStatistics(*parts)


def _num_scored(batch: Batch) -> Tensor:
    return (shift_labels(batch["labels"]) != IGNORE_INDEX).sum().double()


def _cut(batch: Batch, count: int, active_LBT: Tensor | None) -> list[MicroBatch]:
    parts = {name: value.chunk(count) for name, value in batch.items() if value.dim() > 1}
    active = [None] * count if active_LBT is None else active_LBT.chunk(count, dim=1)
    return [
        MicroBatch(
            place,
            parts["input_ids"][place],
            shift_labels(parts["labels"][place]),
            parts["attention_mask"][place] if "attention_mask" in parts else None,
            parts["position_ids"][place] if "position_ids" in parts else None,
            active[place],
        )
        for place in range(count)
    ]


def _filled(batch: Batch, active_LBT: Tensor | None, missing: int) -> tuple[Batch, Tensor | None]:
    """The batch with copies of its last row at its end, which nothing is scored of."""
    if not missing:
        return batch, active_LBT
    filled = {name: torch.cat([value, value[-1:].expand(missing, -1)]) for name, value in batch.items()}
    filled["labels"] = F.pad(batch["labels"], (0, 0, 0, missing), value=IGNORE_INDEX)
    if active_LBT is not None:
        active_LBT = torch.cat([active_LBT, active_LBT[:, -1:].expand(-1, missing, -1)], dim=1)
    return filled, active_LBT


def _slice(statistics: TokenStatistics, count: int) -> TokenStatistics:
    return TokenStatistics(*(getattr(statistics, field.name)[:, :count] for field in fields(TokenStatistics)))
