"""The layers of a pipeline: embedding, blocks with their exits behind them, tail; plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PieceKind = Literal["embed", "block", "exit", "tail"]


@dataclass(frozen=True)
class Piece:
    """What a pipeline never divides.

    Attributes:
        kind: ``embed`` turns ids into the residual stream; ``exit`` is an exit's head and loss; ``tail`` is final norm,
            output matrix and the loss of the full depth.
        layer: its block, from 1; 0 for ``embed`` and ``tail``.
    """

    kind: PieceKind
    layer: int = 0

    @property
    def name(self) -> str:
        """Such as ``embed`` or ``block 3``."""
        return f"{self.kind} {self.layer}" if self.layer else self.kind


def pipeline_pieces(num_blocks: int, exit_layers: Sequence[int]) -> tuple[Piece, ...]:
    """All pieces in the order they run: ``embed``, then blocks, each exit right behind its block, then ``tail``.

    Args:
        num_blocks: of the backbone, at least 1.
        exit_layers: blocks with an exit, in any order.

    Example:
        >>> [piece.name for piece in pipeline_pieces(2, [1])]
        ['embed', 'block 1', 'exit 1', 'block 2', 'tail']
    """
    assert num_blocks >= 1
    assert all(1 <= layer <= num_blocks for layer in exit_layers)
    pieces = [Piece("embed")]
    for layer in range(1, num_blocks + 1):
        pieces.append(Piece("block", layer))
        if layer in exit_layers:
            pieces.append(Piece("exit", layer))
    return (*pieces, Piece("tail"))
