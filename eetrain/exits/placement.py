"""Where exits stand: explicit blocks, every n-th, or fractions of the depth. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eetrain.errors import ConfigError


def resolve_layers(
    num_blocks: int,
    layers: Sequence[int] | None = None,
    every: int | None = None,
    fractions: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """The blocks after which exits stand, ascending.

    Args:
        num_blocks: depth ``L`` of the backbone; blocks count from 1.
        layers: explicit block numbers in ``1..L``; ``[]`` for no exit.
        every: an exit after every ``every``-th block below ``L``.
        fractions: shares of the depth in ``(0, 1]``, rounded half up to a block.

    Raises:
        ConfigError: none or several of the three given, a block outside ``1..L``, or one named twice.
    """
    given = [name for name, value in _named(layers, every, fractions) if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"Exit placement: {' and '.join(given) or 'nothing'} set; exactly one of layers, every, fractions counts.",
            hint="For example exits.layers=[3,6,9], exits.every=4 or exits.fractions=[0.25,0.5].",
        )
    if layers is not None:
        chosen = list(layers)
    elif every is not None:
        if not every >= 1:
            raise ConfigError(f"exits.every={every}, must be at least 1.", hint="every=4 puts exits after 4, 8, ...")
        chosen = list(range(every, num_blocks, every))
    else:
        assert fractions is not None
        chosen = [math.floor(fraction * num_blocks + 0.5) for fraction in fractions]
    _check(chosen, num_blocks)
    return tuple(sorted(chosen))


def _named(
    layers: Sequence[int] | None, every: int | None, fractions: Sequence[float] | None
) -> list[tuple[str, object]]:
    return [("layers", layers), ("every", every), ("fractions", fractions)]


def _check(chosen: list[int], num_blocks: int) -> None:
    outside = [layer for layer in chosen if not 1 <= layer <= num_blocks]
    if outside:
        raise ConfigError(
            f"Exits after blocks {chosen}: {outside} outside 1..{num_blocks}, the blocks of this backbone.",
            hint="Blocks count from 1; an exit stands after the block it names.",
        )
    twice = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if twice:
        raise ConfigError(f"Exits after blocks {chosen}: {twice} named more than once.", hint="Name each block once.")
