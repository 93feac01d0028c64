"""A model cut into stages: what this process keeps, and what it shares with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from eetrain.exits import MultiExitModel
from eetrain.parallel.stage import Stage, parameters_of
from eetrain.planning.costs import piece_costs
from eetrain.planning.partition import partition
from eetrain.planning.pieces import Piece, pipeline_pieces
from eetrain.planning.topology import Topology

ANCHOR = Piece("tail", -1)
"""The layer of a stage on which nothing is trained."""

SharedParameter = tuple[nn.Parameter, tuple[int, ...]]


@dataclass(frozen=True)
class Cut:
    """One process's part of a pipeline.

    Attributes:
        stage: what it runs.
        topology: stages and replicas.
        layers: of the whole pipeline: its pieces, and an anchor on every stage where nothing is trained.
        parts: bounds of the stages in ``layers``.
        shared: trained parameters that several stages use, with these stages, in an order all processes share.
        owners: by a parameter's name in the model, the stage that stores it: the first of the pipeline if that uses it,
            else the last that does. What other stages share with it is on neither of the inner ones then.
    """

    stage: Stage
    topology: Topology
    layers: tuple[Piece, ...]
    parts: tuple[int, ...]
    shared: tuple[SharedParameter, ...]
    owners: dict[str, int]

    def __str__(self) -> str:
        """What each stage holds: ``blocks 1-3, exits 1, 2 | block 4, exit 3``."""
        bounds = zip(self.parts, self.parts[1:], strict=False)
        return " | ".join(_summary(self.layers[start:stop]) for start, stop in bounds)


def _summary(layers: Sequence[Piece]) -> str:
    blocks = [piece.layer for piece in layers if piece.kind == "block"]
    exits = [str(piece.layer) for piece in layers if piece.kind == "exit"]
    span = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
    return span + (f", exit{'s' * (len(exits) > 1)} {', '.join(exits)}" if exits else "")


def balanced_bounds(
    model: MultiExitModel,
    stages: int,
    length: int,
    *,
    full_depth: bool,
    checkpointing: bool = False,
    distils: bool = False,
) -> tuple[int, ...]:
    """Bounds of stages that compute equally much, exits counted.

    Args:
        model: whole, trained parameters marked.
        stages: how many.
        length: tokens of a row.
        full_depth: whether the full depth is trained on.
        checkpointing: whether blocks run again in backward.
        distils: whether exits learn from the full depth.

    Raises:
        TopologyError: more stages than blocks.
    """
    costs = piece_costs(model, length, full_depth=full_depth, distils=distils)
    flops = [float(cost.step_flops(checkpointing=checkpointing)) for cost in costs]
    return partition([cost.piece for cost in costs], flops, stages)


def cut(model: MultiExitModel, bounds: Sequence[int], topology: Topology, rank: int) -> Cut:
    """Cut a model and give up, in place, what belongs to other stages.

    Args:
        model: whole, trained parameters marked.
        bounds: of the stages in the model's pieces.
        topology: stages and replicas.
        rank: of this process.
    """
    pieces = pipeline_pieces(model.num_blocks, model.exit_layers)
    stage = Stage(model, pieces, bounds, topology.stage_of(rank))
    shared = _shared_parameters(model, pieces, bounds)
    layers, parts = _with_anchors(model, pieces, bounds)
    owners = _owners(model, pieces, bounds)
    stage.keep_own()
    return Cut(stage, topology, tuple(layers), tuple(parts), tuple(shared), owners)


def _owners(model: MultiExitModel, pieces: Sequence[Piece], bounds: Sequence[int]) -> dict[str, int]:
    found: dict[int, int] = {}
    for stage in (*range(1, len(bounds) - 1), 0):
        for piece in pieces[bounds[stage] : bounds[stage + 1]]:
            found |= {id(parameter): stage for parameter in parameters_of(model, piece)}
    return {name: found.get(id(p), 0) for name, p in model.named_parameters(remove_duplicate=False)}


def _shared_parameters(model: MultiExitModel, pieces: Sequence[Piece], bounds: Sequence[int]) -> list[SharedParameter]:
    users: dict[int, list[int]] = {}
    found: dict[int, nn.Parameter] = {}
    for stage in range(len(bounds) - 1):
        for piece in pieces[bounds[stage] : bounds[stage + 1]]:
            for parameter in parameters_of(model, piece):
                if parameter.requires_grad and stage not in users.setdefault(id(parameter), []):
                    users[id(parameter)].append(stage)
                    found[id(parameter)] = parameter
    return [(found[key], tuple(stages)) for key, stages in users.items() if len(stages) > 1]


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
