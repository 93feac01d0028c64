"""Every exit against the full depth on given text, all in one pass (teacher forcing).

Comparing two generated texts position by position says little once they part: everything after differs. So the text
is given, and each depth is asked for its next token at each position.

Shape suffixes: ``B`` rows, ``T`` positions, ``N`` scored positions, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eetrain.backbones import Projection
from eetrain.data.tokenization import Example

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel

_CHUNK = 1024
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class DepthScore:
    """One exit on given text.

    Attributes:
        layer: the exit; ``None`` for the full depth.
        tokens: number of scored tokens.
        agreement: share of positions where its most likely token is that of the full depth.
        accuracy: share of positions where its most likely token is the given one.
        nll: mean negative log-likelihood of the given tokens, in nats.
    """

    layer: int | None
    tokens: int
    agreement: float
    accuracy: float
    nll: float


@dataclass
class _Tally:
    agree: int = 0
    correct: int = 0
    nll: float = 0.0

    def add(self, logits_NV: Tensor, choice_N: Tensor, target_N: Tensor) -> None:
        picked_N = logits_NV.argmax(dim=-1)
        self.agree += int((picked_N == choice_N).sum())
        self.correct += int((picked_N == target_N).sum())
        self.nll += float(torch.nn.functional.cross_entropy(precise(logits_NV), target_N, reduction="sum"))


def teacher_forced(
    model: MultiExitModel,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    pad_id: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> list[DepthScore]:
    """Score all exits and the full depth on texts.

    Args:
        model: in eval mode.
        examples: ids, and which of them are scored; padded on the right.
        batch_size: rows a pass.
        pad_id: any id of the vocabulary.
        on_batch: called after each pass.

    Returns:
        One score an exit, ascending, then the full depth's.
    """
    tallies: dict[int | None, _Tally] = {layer: _Tally() for layer in (*model.exit_layers, None)}
    tokens = 0
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            for depths, target_N in _scored_positions(model, examples[start : start + batch_size], pad_id):
                full_NV = depths[None].logits()
                choice_N = full_NV.argmax(dim=-1)
                for layer, tally in tallies.items():
                    tally.add(full_NV if layer is None else depths[layer].logits(), choice_N, target_N)
                tokens += len(target_N)
            on_batch()
    assert tokens, "no scored token"
    return [
        DepthScore(layer, tokens, tally.agree / tokens, tally.correct / tokens, tally.nll / tokens)
        for layer, tally in tallies.items()
    ]


@dataclass(frozen=True)
class _Depth:
    """Features of one depth, which become logits only when they are needed."""

    features_ND: Tensor
    projection: Projection

    def logits(self) -> Tensor:
        return self.projection(self.features_ND)


def _scored_positions(
    model: MultiExitModel, rows: Sequence[Example], pad_id: int
) -> Iterator[tuple[dict[int | None, _Depth], Tensor]]:
    """Chunks of scored positions: every depth before the given token, and the given token."""
    longest = max(len(row.ids) for row in rows)
    ids_BT = _padded([row.ids for row in rows], longest, pad_id, model.device)
    mask_BT = _padded([[1] * len(row.ids) for row in rows], longest, 0, model.device)
    scored_BT = _padded([row.scored for row in rows], longest, 0, model.device).bool()
    output = model(ids_BT, attention_mask=mask_BT)
    asked = scored_BT[:, 1:]
    target_N = ids_BT[:, 1:][asked]
    depths: dict[int | None, _Depth] = {
        layer: _Depth(output.features[layer][:, :-1][asked], output.projections[layer]) for layer in model.exit_layers
    }
    depths[None] = _Depth(output.full_features[:, :-1][asked], output.full_projection)
    for start in range(0, len(target_N), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield (
            {layer: _Depth(depth.features_ND[part], depth.projection) for layer, depth in depths.items()},
            target_N[part],
        )


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int, device: torch.device) -> Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)


def precise(logits: Tensor) -> Tensor:
    """Logits in at least single precision, for logarithms of probabilities."""
    return logits if logits.dtype == torch.float64 else logits.float()
