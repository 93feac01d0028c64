"""What a stage of a pipeline holds at its peak; pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eetrain.planning.activations import PieceActivations
from eetrain.planning.costs import PieceCost

Precision = Literal["float32", "bfloat16"]

_LOGITS_AT_ONCE = 2**27
_FEWEST_TOKENS = 64


@dataclass(frozen=True)
class TrainingState:
    """Bytes of one parameter, with AdamW under DeepSpeed.

    ``float32``: 4 for itself, 4 for its gradient, 8 for AdamW's moments. ``bfloat16``: 2, 2, and 4 for a float32 master
    beside the moments; DeepSpeed's optimizer divides these 12 over the replicas whatever ZeRO stage is set. ZeRO-1
    divides the moments over the replicas and keeps a float32 master with ``float32`` as well.

    Args:
        precision: of parameters, gradients and activations.
        zero_stage: 0 or 1; a pipeline takes no other.
        replicas: of the pipeline (data parallel).
    """

    precision: Precision = "bfloat16"
    zero_stage: int = 1
    replicas: int = 1

    @property
    def number_bytes(self) -> int:
        """Of a parameter, and of a number in its gradient."""
        return 4 if self.precision == "float32" else 2

    @property
    def optimizer_bytes(self) -> float:
        """Of a trained parameter's masters and moments, on each replica."""
        if self.precision == "float32" and self.zero_stage == 0:
            return 8.0
        return 12.0 / self.replicas


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on each replica.

    Attributes:
        weights: all parameters, copies of shared ones included.
        gradients: of the trained ones.
        optimizer: masters and moments.
        activations: kept for backward, of all micro-batches in flight.
        workspace: alive only while one piece runs backward.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        """The peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def stage_memory(
    costs: Sequence[PieceCost],
    activations: Sequence[PieceActivations],
    *,
    state: TrainingState,
    rows: int,
    length: int,
    in_flight: int,
    checkpointing: bool,
) -> StageMemory:
    """The peak of one stage.

    With ``n`` numbers in its parameters and ``t`` in the trained ones, each counted once a stage, ``S`` the bytes that
    its blocks keep for a row, ``H`` those of a hidden state, and ``k`` the distinct hidden states that are kept: inputs
    of blocks that keep theirs, what came from the stage before and went to the next one, and those in front of exits
    and tail::

        weights + gradients + optimizer = n * number_bytes + t * (number_bytes + optimizer_bytes)
        activations                     = in_flight * rows * (S + k H)

    With activation checkpointing ``S`` is 0 and every block's input is kept; running a block again then needs what it
    keeps, for one micro-batch. An exit or the tail needs what its head keeps, the gradient of its features, a chunk of
    logits and the gradient of its output matrix. The workspace is the largest of these: one piece at a time.
    What kernels use inside, the allocator's gaps, communication buffers and the device's own context are not counted.

    Args:
        costs: of the stage's pieces.
        activations: of the same pieces.
        state: bytes of a parameter.
        rows: of a micro-batch.
        length: tokens of a row.
        in_flight: micro-batches whose activations are kept at one time, ``min(P - s, M)`` on stage ``s`` from 0.
        checkpointing: blocks keep their input only.
    """
    weights = {weight for cost in costs for weight in cost.weights}
    numbers = sum(weight.size for weight in weights)
    trained = sum(weight.size for weight in weights if weight.trained)
    pairs = list(zip(costs, activations, strict=True))
    kept = 0 if checkpointing else sum(own.own for cost, own in pairs if cost.piece.kind == "block")
    hidden = max(cost.output_bytes for cost in costs)
    return StageMemory(
        weights=numbers * state.number_bytes,
        gradients=trained * state.number_bytes,
        optimizer=trained * state.optimizer_bytes,
        activations=in_flight * rows * (kept + hidden * len(_kept_places(costs, activations, checkpointing))),
        workspace=max(_workspace(cost, own, hidden, rows, length, checkpointing) for cost, own in pairs),
    )


def loss_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits the loss holds at once, on an accelerator: near ``2^27`` logits."""
    return min(tokens, max(_FEWEST_TOKENS, 1 << round(math.log2(_LOGITS_AT_ONCE / vocabulary))))


def _kept_places(costs: Sequence[PieceCost], activations: Sequence[PieceActivations], checkpointing: bool) -> set[int]:
    """Which hidden states are kept: ``l`` is the one behind block ``l``, 0 the embedding's."""
    places = set()
    for cost, own in zip(costs, activations, strict=True):
        if cost.piece.kind == "block" and cost.backward_flops and (checkpointing or own.keeps_input):
            places.add(cost.piece.layer - 1)
        if cost.piece.kind == "exit" and cost.backward_flops:
            places.add(cost.piece.layer)
    first, last = costs[0].piece, costs[-1].piece
    if first.kind != "embed":
        places.add(first.layer - (first.kind == "block"))
    deepest = max(cost.piece.layer for cost in costs)
    if last.kind != "tail" or costs[-1].backward_flops:
        places.add(deepest)
    return places


def _workspace(
    cost: PieceCost, own: PieceActivations, hidden: int, rows: int, length: int, checkpointing: bool
) -> float:
    if cost.piece.kind == "block":
        return rows * own.own if checkpointing else 0
    if not own.vocabulary:
        return 0
    logits = loss_chunk(rows * length, own.vocabulary) * own.vocabulary
    return rows * (own.own + hidden) + logits * own.logit_bytes + own.matrix_gradient
