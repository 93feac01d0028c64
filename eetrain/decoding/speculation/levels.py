"""The slots of a round of self-speculation, and which blocks have run over them.

Levels are the drafting exits, shallowest first, and behind them the full depth. Level ``i`` runs the blocks between
exit ``i - 1`` and exit ``i``, over the slots of a row that it lacks, from the states that the level before left there.
Rows have lengths of their own; one that lacks fewer slots than another computes some behind its end, which nobody sees.

Shape suffixes: ``B`` rows, ``W`` positions of a window, ``C`` columns of the round (slots from a row's first incomplete
one on), ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eetrain.backbones import Harvest, narrowed, picked, ragged_masks
from eetrain.decoding.cache import Window
from eetrain.decoding.speculation.rows import RaggedRows


@dataclass(frozen=True)
class Advance:
    """A level's blocks, run over a window.

    Attributes:
        first: slot in which each row's window begins; the same as ``first_B``.
        width: ``W``.
        state_BWD: behind the level's last block.
        harvest: what the blocks were called with.
        features_BWD: through the exit's head, if it has keys and values of its own, which every slot must get.
    """

    first: list[int]
    first_B: Tensor
    width: int
    state_BWD: Tensor
    harvest: Harvest
    features_BWD: Tensor | None


class DraftLevels:
    """Advance levels over slots, and cut rows.

    Args:
        rows: whose tokens and cache are worked on.
        exits: that draft, shallowest first.
        columns: how many slots a row may grow in the round, its first incomplete one included.

    Attributes:
        base: slots of each row that all blocks have run over; the token in the next one is known.
        known: slots of each row that hold a token.
        reached: by level, slots of each row that its blocks have run over.
    """

    def __init__(self, rows: RaggedRows, exits: Sequence[int], columns: int) -> None:
        self.rows = rows
        self.depths = (*exits, rows.model.num_blocks)
        self.base = list(rows.complete)
        self.known = [slots + 1 for slots in self.base]
        self.reached = [list(self.base) for _ in self.depths]
        self.columns = columns
        slots = max(self.base) + columns
        rows.reserve(slots + columns)  # a row that lags behind looks at tokens beyond its own
        self._base_B = torch.tensor(self.base, device=rows.ids.device)
        self._slot_BC = self._base_B[:, None] + torch.arange(columns, device=rows.ids.device)
        self._position_BC = rows.positions_in(self._slot_BC)
        self._even = min(self.base) == max(self.base)
        self._states: list[Tensor | None] = [None] * len(exits)
        self._masks = ragged_masks(rows.config, self._base_B, columns, rows.visible[:, :slots], rows.dtype)

    def advance(self, level: int) -> Advance | None:
        """Run ``level`` over all slots it lacks, the levels before it first; ``None`` if it lacks none."""
        if level:
            self.advance(level - 1)
        lacking = [known - reached for known, reached in zip(self.known, self.reached[level], strict=True)]
        width = max(lacking)
        if not width:
            return None
        columns = self._columns(level, lacking)
        shared = columns[0] if len(set(columns)) == 1 else None
        column_BW = None if shared is not None else self._spread(columns, width)
        harvest = self._harvest(level, columns, column_BW, width)
        state_BWD = harvest.hidden_BTD if level == 0 else self._read(level - 1, shared, column_BW, width)
        start = self.depths[level - 1] if level else 0
        blocks = range(start + 1, self.depths[level] + 1)
        state_BWD = self.rows.harvester_to(self.depths[level]).run(harvest, state_BWD, blocks)
        self.rows.block_calls += len(blocks) * sum(lacking)
        self.reached[level] = list(self.known)
        features_BWD = None
        if level < len(self._states):
            self._write(level, shared, column_BW, state_BWD)
            if self.rows.model.head(self.depths[level]).attends:
                features_BWD = self.rows.features(self.depths[level], state_BWD, harvest)
        first = [slots + column for slots, column in zip(self.base, columns, strict=True)]
        first_B = torch.tensor(first, device=self._base_B.device)
        return Advance(first, first_B, width, state_BWD, harvest, features_BWD)

    def put(self, row: int, slots: int, level: int) -> None:
        """Row ``row`` now ends with a token of ``level``'s own, in the last of its ``slots``."""
        self.known[row] = slots
        for reached in self.reached[: level + 1]:
            reached[row] = min(reached[row], slots - 1)

    def _columns(self, level: int, lacking: list[int]) -> list[int]:
        """Where each row's window begins: one place for all, if those that lack nothing do not reach beyond it."""
        own = [reached - slots for reached, slots in zip(self.reached[level], self.base, strict=True)]
        wanted = {column for column, lacks in zip(own, lacking, strict=True) if lacks}
        if len(wanted) == 1 and max(own) <= max(wanted):
            return [max(wanted)] * len(own)
        return own

    def _spread(self, columns: list[int], width: int) -> Tensor:
        start_B1 = torch.tensor(columns, device=self._base_B.device)[:, None]
        return (start_B1 + torch.arange(width, device=start_B1.device)).clamp(max=self._slot_BC.shape[1] - 1)

    def _harvest(self, level: int, columns: list[int], column_BW: Tensor | None, width: int) -> Harvest:
        rows, start = self.rows, columns[0]
        firsts = [slots + column for slots, column in zip(self.base, columns, strict=True)]
        first, last = min(firsts), min(max(firsts) + width, max(self.base) + self.columns)
        if column_BW is None:
            slot_BW = self._slot_BC[:, start : start + width]
            position_BW = self._position_BC[:, start : start + width]
            masks = narrowed(self._masks, start, width, last)
        else:
            slot_BW, position_BW = self._slot_BC.gather(1, column_BW), self._position_BC.gather(1, column_BW)
            masks = picked(self._masks, column_BW, last)
        together = self._even and column_BW is None
        ids_BW = rows.ids[:, first:last] if together else rows.ids.gather(1, slot_BW)
        rows.cache.window = Window(first, last, slots=None if together else slot_BW)
        return rows.harvester_to(self.depths[level])(
            ids_BW, attention_mask=masks, position_ids=position_BW, cache=rows.cache
        )

    def _read(self, level: int, shared: int | None, column_BW: Tensor | None, width: int) -> Tensor:
        states_BCD = self._states[level]
        assert states_BCD is not None, "the level before has not run"
        if shared is not None:
            return states_BCD[:, shared : shared + width]
        assert column_BW is not None
        return states_BCD.gather(1, column_BW[..., None].expand(-1, -1, states_BCD.shape[-1]))

    def _write(self, level: int, shared: int | None, column_BW: Tensor | None, state_BWD: Tensor) -> None:
        width, size = state_BWD.shape[1:]
        states_BCD = self._states[level]
        if states_BCD is None:
            states_BCD = self._states[level] = state_BWD.new_zeros(*self._slot_BC.shape, size)
        if shared is not None:
            states_BCD[:, shared : shared + width] = state_BWD
        else:
            assert column_BW is not None
            states_BCD.scatter_(1, column_BW[..., None].expand(-1, -1, size), state_BWD)
