"""DeepSpeed's pipeline module around a multi-exit model. Import after ``load_deepspeed()``.

Shape suffixes: ``B`` rows, ``T`` positions, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn

from eetrain.exits import MultiExitModel
from eetrain.parallel.layers import Anchor, Layer, Travelling, Work, build_layer, unpack
from eetrain.parallel.pieces import Piece
from eetrain.parallel.stage import Stage, parameters_of
from eetrain.parallel.topology import Topology
from eetrain.training.precision import keeping_tables

ANCHOR = Piece("tail", -1)


@dataclass(frozen=True)
class Tie:
    """A trained parameter with a copy on several stages: its gradients are added up over them.

    Args:
        parameter: this process's copy.
        stages: that hold one, ascending.
        group: of the processes with these stages in this replica.
    """

    parameter: nn.Parameter
    stages: tuple[int, ...]
    group: dist.ProcessGroup


class _PieceSpec(LayerSpec):  # type: ignore[misc]
    """A layer that is built where it runs."""

    def __init__(self, work: Work, piece: Piece) -> None:
        super().__init__(Layer)
        self.work, self.piece = work, piece

    def build(self, log: bool = False) -> Layer:
        if self.piece is ANCHOR:
            return Anchor(self.work, next(self.work.stage.model.backbone.parameters()).dtype)
        return build_layer(self.work, self.piece)


class ExitPipeline(PipelineModule):  # type: ignore[misc]
    """The layers of one process. Its parameters are those of the model given, on this process's stage.

    Args:
        model: whole, trained parameters marked; what belongs to other stages is given up.
        pieces: of the whole pipeline.
        bounds: of the stages.
        topology: stages and replicas.
    """

    def __init__(
        self, model: MultiExitModel, pieces: Sequence[Piece], bounds: Sequence[int], topology: Topology
    ) -> None:
        rank = dist.get_rank()
        stage = Stage(model, pieces, bounds, topology.stage_of(rank))
        shared = _shared_parameters(model, pieces, bounds)
        layers, parts = _with_anchors(model, pieces, bounds)
        stage.keep_own()
        work = Work(stage)
        self._parts = parts
        self.__dict__.update(stage=stage, work=work, on_gradients=None)
        super().__init__(
            [_PieceSpec(work, piece) for piece in layers],
            topology=PipeDataParallelTopology(num_pp=topology.stages, num_dp=topology.replicas),
        )
        self.ties = _ties(shared, topology, rank)
        for parameter in self.parameters():
            parameter.model_parallel = True  # counts in the norm of all gradients
        for tie in self.ties:
            replicated = tie.stages[0] != stage.index
            tie.parameter.ds_pipe_replicated = replicated  # type: ignore[attr-defined]
            tie.parameter.model_parallel = not replicated  # type: ignore[attr-defined]
            dist.broadcast(tie.parameter.data, topology.rank_of(tie.stages[0], topology.replica_of(rank)), tie.group)

    stage: Stage
    work: Work
    on_gradients: Callable[[], None] | None
    """Called once a step, when the gradients of all micro-batches are there and nothing is done with them yet."""

    def forward(self, travelling: Travelling) -> Travelling:
        """Run the stage on its next micro-batch."""
        work = self.work
        micro = work.micros.pop(0)
        work.micro = micro
        if not self.stage.is_first:
            self.stage.begin(micro, unpack(travelling)[0])
        result: Travelling = super().forward(travelling)
        return result

    def train(self, mode: bool = True) -> ExitPipeline:
        """A frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.stage.frozen:
            self.stage.model.backbone.eval()
        return self

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """What the engine adds up over stages; it asks when the step's gradients are complete."""
        if self.on_gradients is not None:
            self.on_gradients()
        return [(tie.parameter, tie.group) for tie in self.ties]

    def _partition_layers(self, method: str = "") -> None:
        self.parts = list(self._parts)
        self._set_bounds(start=self.parts[self.stage.index], stop=self.parts[self.stage.index + 1])

    def _apply(self, fn: Any, recurse: bool = True) -> ExitPipeline:
        with keeping_tables(self):
            super()._apply(fn, recurse)
        return self


def _shared_parameters(
    model: MultiExitModel, pieces: Sequence[Piece], bounds: Sequence[int]
) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """Trained parameters that several stages use, with these stages, in an order that all processes share."""
    users: dict[int, list[int]] = {}
    found: dict[int, nn.Parameter] = {}
    for stage in range(len(bounds) - 1):
        for piece in pieces[bounds[stage] : bounds[stage + 1]]:
            for parameter in parameters_of(model, piece):
                if parameter.requires_grad and stage not in users.setdefault(id(parameter), []):
                    users[id(parameter)].append(stage)
                    found[id(parameter)] = parameter
    return [(found[key], tuple(stages)) for key, stages in users.items() if len(stages) > 1]


def _ties(
    shared: Sequence[tuple[nn.Parameter, tuple[int, ...]]], topology: Topology, rank: int
) -> list[Tie]:
    """This process's ties; every process must make every group."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for stages in dict.fromkeys(stages for _, stages in shared):
        for replica in range(topology.replicas):
            ranks = [topology.rank_of(stage, replica) for stage in stages]
            group = dist.new_group(ranks)
            if rank in ranks:
                groups[stages] = group
    return [Tie(parameter, stages, groups[stages]) for parameter, stages in shared if stages in groups]


def _with_anchors(
    model: MultiExitModel, pieces: Sequence[Piece], bounds: Sequence[int]
) -> tuple[list[Piece], list[int]]:
    """The layers and their bounds, with an anchor on every stage where nothing is trained."""
    layers: list[Piece] = []
    parts = [0]
    for stage in range(len(bounds) - 1):
        own = list(pieces[bounds[stage] : bounds[stage + 1]])
        if not any(parameter.requires_grad for piece in own for parameter in parameters_of(model, piece)):
            own.insert(len(own) - (own[-1].kind == "tail"), ANCHOR)
        layers += own
        parts.append(len(layers))
    return layers, parts
