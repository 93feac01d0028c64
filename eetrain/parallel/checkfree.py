"""CheckFree: a lost stage of a pipeline made anew from the two beside it. Names, weights and means; reads no files.

*All is Not Lost: LLM Recovery without Checkpoints* (Blagoev, Ersoy, Chen; arXiv 2506.15461)::

    W_i = (w_{i-1} W_{i-1} + w_{i+1} W_{i+1}) / (w_{i-1} + w_{i+1}),    w_j = |g_j|^power + 1e-4

elementwise over homologous tensors of the blocks, with ``g_j`` the last gradient of stage ``j`` after clipping. The
paper squares the norm (``power=2``). The authors' code does not (``power=1``), and adds the 1e-4: without it two stages
at rest would have no mean.

Where we differ:

- Their stages hold blocks only, so ``|g|`` is that of the stage's blocks here: a gradient of embeddings or exits says
  nothing about them.
- Theirs are equally large. Here block ``k`` of ``n`` (from 0) takes the block of a neighbour of ``m`` that lies where
  the middle of it does, ``(2 k + 1) m // (2 n)``; with ``n = m`` that is block ``k``.
- They have no exits. The head of an exit is a copy of that of the nearest exit on a stage that is there, of two equally
  near ones the shallower, if both have the same tensors; else it is as the run begins with it.
- What training does not change (a frozen backbone) and adapters are as the run begins with them. Frozen weights are
  exact then. A mean of LoRA's factors is no mean of their products, and the block below the adapter is not lost.

Embedding, final norm, output matrix and gates are on the first and the last stage of a checkpoint. These stages and two
lost neighbours are refused. The paper keeps copies of the former; its CheckFree+ trains stages to stand for each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from eetrain.errors import CheckpointError

Power = Literal[1, 2]
EXITS = "model.exits."
_FLOOR = 1e-4
_ADAPTER = ".lora_"
_HINT = "Use an older checkpoint of the run."


@dataclass(frozen=True)
class Source:
    """What a tensor is made of: the mean of stored ones; of none, what the run begins with.

    Attributes:
        names: of the stored tensors.
        weights: theirs, positive, of any sum.
    """

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Written:
    """What the stages of a pipeline have written, by the names of parameters.

    Attributes:
        stages: how many.
        stage_of: which of them wrote a parameter.
        trained: parameters with a state of the optimizer.
        shapes: of all parameters of the model.
        blocks: what names of a block's parameters begin with, up to its number, which counts from 0.
        norms: of the last gradient of every stage's blocks; ``None`` where unknown.
    """

    stages: int
    stage_of: Mapping[str, int]
    trained: Collection[str]
    shapes: Mapping[str, Sequence[int]]
    blocks: str
    norms: Sequence[float | None] = ()

    def parameters(self, stage: int) -> list[str]:
        """Those a stage wrote."""
        return [name for name, of in self.stage_of.items() if of == stage]

    def blocks_on(self, stage: int) -> list[int]:
        """Numbers of a stage's blocks, ascending, from 0."""
        own = self.parameters(stage)
        return sorted({self.place(name)[0] for name in own if name.startswith(self.blocks)})

    def place(self, name: str) -> tuple[int, str]:
        """Block of a block's parameter, and the parameter's name in it."""
        number, _, rest = name.removeprefix(self.blocks).partition(".")
        return int(number), rest

    def norms_known(self, stage: int) -> bool:
        """Whether the norms of the stages before and after are."""
        return None not in self._norms_beside(stage)

    def weights(self, stage: int, power: Power) -> tuple[float, float]:
        """Those of the stages before and after; equal ones where a norm is unknown."""
        before, after = self._norms_beside(stage)
        if before is None or after is None:
            return 1.0, 1.0
        return before**power + _FLOOR, after**power + _FLOOR

    def _norms_beside(self, stage: int) -> tuple[float | None, float | None]:
        before, after = (self.norms[at] if at < len(self.norms) else None for at in (stage - 1, stage + 1))
        return before, after


def rebuild(lost: Collection[int], written: Written, power: Power = 1) -> dict[str, Source]:
    """What every parameter of the lost stages is made of.

    Args:
        lost: stages, from 0.
        written: what there is and was.
        power: of the norms.

    Raises:
        CheckpointError: a stage that cannot be rebuilt, with the reason.
    """
    check_stages(lost, written.stages)
    return {name: source for stage in sorted(lost) for name, source in _of_stage(stage, lost, written, power)}


def check_stages(lost: Collection[int], stages: int) -> None:
    """Refuse stages that have no neighbours to be made of.

    Raises:
        CheckpointError: names them.
    """
    for stage in sorted(lost):
        if not 0 <= stage < stages:
            raise _refused(stage, f"the checkpoint was written by {stages} stages, counted from 0")
        if stage in (0, stages - 1):
            raise _refused(
                stage,
                "embedding, final norm and output matrix are on the first and the last stage, and no stage beside "
                "them holds their like",
            )
    for one, two in pairwise(sorted(lost)):
        if two == one + 1:
            raise CheckpointError(
                f"Stages {one} and {two} cannot be rebuilt: each is the other's neighbour.", hint=_HINT
            )


def homologous(place: int, count: int, other: int) -> int:
    """Place of a block's counterpart on a stage of another size, from 0; see the module.

    Args:
        place: of the block on its stage, from 0.
        count: blocks of that stage.
        other: blocks of the other stage.

    Example:
        >>> [homologous(place, 4, 2) for place in range(4)]
        [0, 0, 1, 1]
    """
    return (2 * place + 1) * other // (2 * count)


def mean(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(w W) / sum(w)`` elementwise, computed in float64 and rounded to the type of the first."""
    first, *rest = tensors
    total = first.double() * weights[0]
    for tensor, weight in zip(rest, weights[1:], strict=True):
        total += tensor.double() * weight  # in two roundings everywhere: all processes must get the same bits
    return (total / torch.tensor(weights, dtype=torch.float64).sum()).to(first.dtype)


def _of_stage(stage: int, lost: Collection[int], written: Written, power: Power) -> Iterator[tuple[str, Source]]:
    weights, heads = written.weights(stage, power), _copied_exits(stage, lost, written)
    sides = [(beside, _counterparts(stage, beside, written)) for beside in (stage - 1, stage + 1)]
    for name in written.parameters(stage):
        if name not in written.shapes:
            raise _refused(stage, f"this run has no {name}")
        if _ADAPTER in name or name not in written.trained:
            yield name, Source()
        elif name.startswith(written.blocks):
            yield name, Source(tuple(_counterpart(name, stage, *side, written) for side in sides), weights)
        elif name.startswith(EXITS):
            layer, rest = exit_of(name)
            yield name, Source((f"{EXITS}{heads[layer]}.{rest}",), (1.0,)) if layer in heads else Source()
        else:
            raise _refused(stage, f"{name} belongs to no block and no exit")


def _counterparts(stage: int, beside: int, written: Written) -> dict[int, int]:
    """Blocks of a stage with their counterparts on another one; nothing if that has none."""
    own, others = written.blocks_on(stage), written.blocks_on(beside)
    return {block: others[homologous(place, len(own), len(others))] for place, block in enumerate(own) if others}


def _counterpart(name: str, stage: int, beside: int, blocks: Mapping[int, int], written: Written) -> str:
    number, rest = written.place(name)
    found = f"{written.blocks}{blocks[number]}.{rest}" if blocks else "no block"
    if written.stage_of.get(found) != beside:
        raise _refused(stage, f"{name} has no counterpart on stage {beside} ({found})")
    one, other = tuple(written.shapes[name]), tuple(written.shapes.get(found, ()))
    if one != other:
        raise _refused(stage, f"{name} has the shape {one}, but its counterpart on stage {beside}, {found}, {other}")
    return found


def _copied_exits(stage: int, lost: Collection[int], written: Written) -> dict[int, int]:
    """Exits of a stage that have some like them on stages that are there, with the nearest of these."""
    heads: dict[int, dict[str, tuple[int, ...]]] = {}
    standing = set()
    for name, of in written.stage_of.items():
        if name.startswith(EXITS):
            layer, rest = exit_of(name)
            heads.setdefault(layer, {})[rest] = tuple(written.shapes.get(name, ()))
            if of not in lost:
                standing.add(layer)
    own = {exit_of(name)[0] for name in written.parameters(stage) if name.startswith(EXITS)}
    found = {}
    for layer in own:
        alike = [other for other in standing if heads[other] == heads[layer]]
        if alike:
            found[layer] = min(alike, key=lambda other: (abs(other - layer), other))
    return found


def exit_of(name: str) -> tuple[int, str]:
    """Layer of a parameter of an exit, and the parameter's name in its head."""
    layer, _, rest = name.removeprefix(EXITS).partition(".")
    return int(layer), rest


def _refused(stage: int, reason: str) -> CheckpointError:
    return CheckpointError(f"Stage {stage} cannot be rebuilt: {reason}.", hint=_HINT)
