"""DeepSpeed's layers: one per piece of the model, each a thin skin around the real modules.

What passes between them is the hidden state, and what the task wants beside it.

Shape suffixes: ``B`` rows, ``T`` positions, ``D`` hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from eetrain.backbones import blocks_of
from eetrain.backbones.anatomy import decoder_of, submodule
from eetrain.objectives import FULL
from eetrain.parallel.injection import end, hold
from eetrain.parallel.stage import MicroBatch, Stage
from eetrain.planning.pieces import Piece

Travelling = Tensor | tuple[Tensor, Tensor]


class Task(ABC):
    """What happens at the depths while a batch passes."""

    travels: bool = False
    """Whether something travels beside the hidden state."""

    @abstractmethod
    def visit(
        self, stage: Stage, depth: int, hidden_BTD: Tensor, beside: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Look at a hidden state; returns it, perhaps with a loss injected, and what travels beside it."""

    def start(self, hidden_BTD: Tensor) -> Tensor | None:
        """What travels beside the first hidden state: integers, or floats for which something comes back."""
        return None

    def leave(self, beside: Tensor | None, micro: MicroBatch) -> Tensor | None:
        """What travels on from a stage that is not the last."""
        return beside


class Work:
    """What all layers of a process share: the stage, the present micro-batch, and the task."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.micros: list[MicroBatch] = []
        self.task: Task | None = None
        self.micro: MicroBatch | None = None

    def visit(self, depth: int, travelling: Travelling) -> Travelling:
        """Let the task look at a depth."""
        assert self.task is not None
        assert self.micro is not None
        hidden_BTD, beside = unpack(travelling)
        return pack(*self.task.visit(self.stage, depth, hidden_BTD, beside, self.micro))

    def leave(self, travelling: Travelling) -> Travelling:
        """End the stage, which is not the last."""
        assert self.task is not None
        assert self.micro is not None
        hidden_BTD, beside = unpack(travelling)
        return pack(hidden_BTD, self.task.leave(beside, self.micro))


def pack(hidden_BTD: Tensor, beside: Tensor | None) -> Travelling:
    """What travels. Floats come before integers, as the engine reuses its buffers by place.

    Of two floats the first gets its gradient first, and that is what the exits wait for.
    """
    if beside is None:
        return hidden_BTD
    return (beside, hidden_BTD) if beside.is_floating_point() else (hidden_BTD, beside)


def unpack(travelling: Travelling) -> tuple[Tensor, Tensor | None]:
    """The hidden state and what travels beside it."""
    if isinstance(travelling, Tensor):
        return travelling, None
    first, last = travelling
    return (last, first) if last.is_floating_point() else (first, last)


class Layer(nn.Module):
    """Base of the layers.

    Args:
        work: shared by the layers of a process.
        modules: the real ones, which this layer's parameters belong to.
    """

    def __init__(self, work: Work, *modules: nn.Module) -> None:
        super().__init__()
        self.real = nn.ModuleList(modules)
        self.__dict__["work"] = work

    def forward(self, travelling: Travelling) -> Travelling:
        """Run on what the layer before gave."""
        work: Work = self.__dict__["work"]
        return self.run(work, travelling)

    def run(self, work: Work, travelling: Travelling) -> Travelling:
        """What the layer does."""
        raise NotImplementedError


class Embed(Layer):
    """Ids to the residual stream. The engine hands in the ids; the micro-batch has them too."""

    def run(self, work: Work, travelling: Travelling) -> Travelling:
        """Harvest from ids."""
        assert work.micro is not None
        assert work.task is not None
        hidden_BTD = work.stage.begin(work.micro, None)
        return pack(hidden_BTD, work.task.start(hidden_BTD))


class Block(Layer):
    """One block."""

    def __init__(self, work: Work, layer: int, *modules: nn.Module) -> None:
        super().__init__(work, *modules)
        self.layer = layer

    def run(self, work: Work, travelling: Travelling) -> Travelling:
        """Run the block; what travels beside the hidden state passes by."""
        assert work.micro is not None
        hidden_BTD, beside = unpack(travelling)
        return pack(work.stage.run_block(self.layer, hidden_BTD, work.micro), beside)


class Exit(Layer):
    """An exit's head and its loss."""

    def __init__(self, work: Work, layer: int, *modules: nn.Module) -> None:
        super().__init__(work, *modules)
        self.layer = layer

    def run(self, work: Work, travelling: Travelling) -> Travelling:
        """Visit the exit."""
        return work.visit(self.layer, travelling)


class Tail(Layer):
    """Final norm, output matrix and the loss of the full depth."""

    def run(self, work: Work, travelling: Travelling) -> Travelling:
        """Visit the full depth; returns the engine's loss of 0."""
        hidden_BTD, _ = unpack(work.visit(FULL, travelling))
        return end(hidden_BTD)


class Anchor(Layer):
    """A parameter that takes no part, for a stage on which nothing is trained: the engine wants one."""

    def __init__(self, work: Work, dtype: torch.dtype) -> None:
        super().__init__(work)
        self.anchor = nn.Parameter(torch.zeros(1, dtype=dtype))

    def run(self, work: Work, travelling: Travelling) -> Travelling:
        """Pass on."""
        hidden_BTD, beside = unpack(travelling)
        return pack(hold(hidden_BTD, self.anchor), beside)


def build_layer(work: Work, piece: Piece) -> Layer:
    """The layer of a piece, around the modules of the stage's model."""
    model = work.stage.model
    if piece.kind == "block":
        return Block(work, piece.layer, blocks_of(model.backbone, model.anatomy)[piece.layer - 1])
    if piece.kind == "embed":
        return Embed(work, *_frame(model.backbone, model.anatomy))
    norm, matrix = model.shared_tail()[0], model.causal_lm.get_submodule(model.anatomy.head)
    if piece.kind == "tail":
        return Tail(work, norm, matrix)
    head = model.head(piece.layer)
    shared = [norm] * (head.norm is None) + [matrix] * (head.output is None)
    return Exit(work, piece.layer, head, *shared)


def _frame(backbone: nn.Module, anatomy: Any) -> list[nn.Module]:
    """What the decoder runs before its blocks."""
    decoder = decoder_of(backbone, anatomy)
    owner_path, _, list_name = anatomy.blocks.rpartition(".")
    owner = submodule(decoder, owner_path)
    norm = submodule(decoder, anatomy.norm)
    return [child for name, child in owner.named_children() if name != list_name and child is not norm]
