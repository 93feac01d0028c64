"""The one object behind SkipDecode and its relatives: position -> set of blocks.

Positions are counted from the first generated token: the token fed in ``t`` steps after the prompt has index ``t``,
all of the prompt has index -1. Sets never grow along a text. So a block that runs at some position has run at every
earlier one and finds all keys and values it attends to: nothing is recomputed, copied or missing (SkipDecode, arXiv
2307.02628). Sets that never grow are the same as one number a block, its *reach*: it runs at all indices below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eetrain.errors import ConfigError

PROMPT = -1
"""Index of the prompt's positions."""
FOREVER = 2**31 - 1
"""Reach of a block that never stops running; fits a 32-bit integer."""


@dataclass(frozen=True)
class BlockSchedule:
    """Which blocks run at which index.

    Attributes:
        reach: for block ``l``, ``reach[l - 1]``: it runs at indices below. :data:`FOREVER`: always; 0: in the prompt
            only; -1: never.
        from_start: the index of a position is its distance from the start of the text, prompt included, instead of
            from the prompt's end.

    Example:
        >>> schedule = BlockSchedule.from_sets(4, prompt=(1, 2, 3, 4), generated=[(1, 3, 4), (1, 4)])
        >>> schedule.reach
        (2147483647, 0, 1, 2147483647)
        >>> schedule.active(0), schedule.active(7)
        ((1, 3, 4), (1, 4))
    """

    reach: tuple[int, ...]
    from_start: bool = False

    @classmethod
    def from_sets(
        cls,
        num_blocks: int,
        *,
        prompt: Sequence[int],
        generated: Sequence[Sequence[int]],
        from_start: bool = False,
    ) -> BlockSchedule:
        """The schedule with these sets.

        Args:
            num_blocks: of the backbone.
            prompt: blocks of the prompt's positions, counted from 1.
            generated: blocks at index 0, 1, ...; the last set goes on for ever.
            from_start: see the class.

        Raises:
            ConfigError: a set is empty, names a block there is not, or has a block that the set before lacks.
        """
        sets = [frozenset(prompt), *map(frozenset, generated)]
        assert generated, "no set for generated tokens"
        for place, blocks in enumerate(sets):
            where = "the prompt" if place == 0 else f"index {place - 1}"
            if not blocks or min(blocks) < 1 or max(blocks) > num_blocks:
                raise ConfigError(
                    f"The schedule runs blocks {sorted(blocks)} at {where} of a model with {num_blocks} blocks.",
                    hint=f"Use at least one block at each position, from 1 to {num_blocks}.",
                )
            grown = blocks - sets[max(place - 1, 0)]
            if grown:
                raise ConfigError(
                    f"The schedule runs block {min(grown)} at {where} but not before, so the block would lack keys and "
                    "values of earlier positions.",
                    hint="Let the sets of blocks only shrink along the text.",
                )
        return cls(tuple(_reach(block, sets) for block in range(1, num_blocks + 1)), from_start)

    @property
    def num_blocks(self) -> int:
        """Blocks of the backbone the schedule is for."""
        return len(self.reach)

    def active(self, index: int) -> tuple[int, ...]:
        """Blocks that run at an index, ascending; -1 for the prompt."""
        return tuple(block for block, reach in enumerate(self.reach, start=1) if index < reach)

    def depth(self, index: int) -> int:
        """Number of blocks that run at an index."""
        return sum(index < reach for reach in self.reach)


def _reach(block: int, sets: Sequence[frozenset[int]]) -> int:
    count = sum(block in blocks for blocks in sets)
    return FOREVER if count == len(sets) else count - 1
