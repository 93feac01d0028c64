"""DeepSpeed's pipeline module around a multi-exit model. Import after ``load_deepspeed()``.

Shape suffixes: ``B`` rows, ``T`` positions, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn

from eetrain.parallel.cut import ANCHOR, Cut, SharedParameter
from eetrain.parallel.deepspeed_setup import quiet
from eetrain.parallel.layers import Anchor, Layer, Travelling, Work, build_layer, unpack
from eetrain.parallel.stage import Stage
from eetrain.planning.pieces import Piece
from eetrain.planning.topology import Topology
from eetrain.training.precision import keeping_tables


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


class _PieceSpec(LayerSpec):
    """A layer that is built where it runs."""

    def __init__(self, work: Work, piece: Piece) -> None:
        super().__init__(Layer)
        self.work, self.piece = work, piece

    def build(self, log: bool = False) -> Layer:
        if self.piece is ANCHOR:
            return Anchor(self.work, next(self.work.stage.model.backbone.parameters()).dtype)
        return build_layer(self.work, self.piece)


class ExitPipeline(PipelineModule):
    """The layers of one process. Its parameters are those of the model given, on this process's stage.

    Args:
        part: of this process.

    Attributes:
        work: what its layers share.
        ties: its parameters with copies on other stages.
        on_gradients: called once a step, when the gradients of all micro-batches are there and nothing is done with
            them yet.
    """

    work: Work
    on_gradients: Callable[[], None] | None

    def __init__(self, part: Cut) -> None:
        rank, topology, work = dist.get_rank(), part.topology, Work(part.stage)
        # Past nn.Module, which is not there yet: the base class asks for the stages while it is built.
        self.__dict__.update(work=work, on_gradients=None, given_parts=part.parts)
        with quiet():
            super().__init__(
                [_PieceSpec(work, piece) for piece in part.layers],
                topology=PipeDataParallelTopology(num_pp=topology.stages, num_dp=topology.replicas),
            )
        self.ties = _ties(part.shared, topology, rank)
        for parameter in self.parameters():
            parameter.model_parallel = True  # counts in the norm of all gradients
        for tie in self.ties:
            replicated = tie.stages[0] != part.stage.index
            tie.parameter.ds_pipe_replicated = replicated  # type: ignore[attr-defined]
            tie.parameter.model_parallel = not replicated  # type: ignore[attr-defined]
            dist.broadcast(tie.parameter.data, topology.rank_of(tie.stages[0], topology.replica_of(rank)), tie.group)
        for gate_parameter in part.stage.model.gates.parameters():
            dist.broadcast(gate_parameter.data, 0)

    @property
    def stage(self) -> Stage:
        """What this process runs."""
        return self.work.stage

    def forward(self, travelling: Travelling) -> Travelling:
        """Run the stage on its next micro-batch."""
        work = self.work
        micro = work.micros.pop(0)
        work.micro = micro
        if not self.stage.is_first:
            self.stage.begin(micro, unpack(travelling)[0])
        result: Travelling = super().forward(travelling)
        return result if self.stage.is_last else work.leave(result)

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
        self.parts = list(self.__dict__["given_parts"])
        self._set_bounds(start=self.parts[self.stage.index], stop=self.parts[self.stage.index + 1])

    def _apply(self, fn: Any, recurse: bool = True) -> ExitPipeline:
        with keeping_tables(self):
            super()._apply(fn, recurse)
        return self


def _ties(shared: Sequence[SharedParameter], topology: Topology, rank: int) -> list[Tie]:
    """This process's ties; every process must make every group."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for stages in dict.fromkeys(stages for _, stages in shared):
        for replica in range(topology.replicas):
            ranks = [topology.rank_of(stage, replica) for stage in stages]
            group = dist.new_group(ranks)
            if rank in ranks:
                groups[stages] = group
    return [Tie(parameter, stages, groups[stages]) for parameter, stages in shared if stages in groups]
