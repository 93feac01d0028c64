"""A key/value cache addressed by slot, in which each block and row may hold a different length.

All rows share the slots ``0..N-1`` (left-padded prompt, then generated tokens). For every block and row the slots
that hold keys and values are a prefix; the runner owns these lengths. A *window* says which rows and slots the
current call of blocks computes; masks and rotary tables are harvested against it.

Shape suffixes: ``B`` rows, ``H`` key/value heads, ``N`` slots, ``W`` slots of the window, ``E`` head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_MIN_GROWTH = 64


class KeysStoredError(Exception):
    """Raised by a store-only window once keys and values are written: the rest of the block need not run."""


@dataclass(frozen=True)
class Window:
    """The slots ``first..last-1`` of some rows.

    Attributes:
        first: first slot computed.
        last: one past the last.
        rows: which rows ``[R]``, or ``None`` for all.
        valid: ``[R, W]``; where false the slot is deeper already and must not be overwritten. ``None``: all valid.
        store_only: write keys and values, then stop the block by :class:`KeysStoredError`.
        slots: ``[R, W]``, where rows have got unequally far: the slots of each row's own window, all rows, all valid.
            ``first`` and ``last`` then span all of them.
    """

    first: int
    last: int
    rows: Tensor | None = None
    valid: Tensor | None = None
    store_only: bool = False
    slots: Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """Keys and values of one block, in buffers that grow by doubling; sliding windows are left to the masks."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers for the rows of the first call."""
        capacity = self.cache.window.last + _MIN_GROWTH
        self.keys = _buffer(key_states, capacity)
        self.values = _buffer(value_states, capacity)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the window's keys and values ``[R, H, W, E]``; return all slots up to its end ``[R, H, N, E]``."""
        window = self.cache.window
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._reserve(window.last)
        keys = _write(self.keys, key_states, window)
        values = _write(self.values, value_states, window)
        if window.store_only:
            raise KeysStoredError
        return keys, values

    def _reserve(self, slots: int) -> None:
        capacity = self.keys.shape[2]
        if slots > capacity:
            self.keys = _grow(self.keys, max(2 * capacity, slots))
            self.values = _grow(self.values, max(2 * capacity, slots))

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but ``rows``."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        """Slots before the window."""
        return self.cache.window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of key slots a mask must cover, and the first of them."""
        return self.cache.window.first + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class SlotCache(Cache):
    """The cache of a decoding run; set :attr:`window` before blocks are called.

    Args:
        num_layers: blocks of the backbone plus exit heads that have attention.
    """

    def __init__(self, num_layers: int) -> None:
        self.window = Window(0, 0)
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but ``rows`` from every layer."""
        for layer in self.layers:
            layer.keep(rows)


def _buffer(like_BHWE: Tensor, capacity: int) -> Tensor:
    rows, heads, _, size = like_BHWE.shape
    return like_BHWE.new_zeros(rows, heads, capacity, size)


def _grow(buffer_BHNE: Tensor, capacity: int) -> Tensor:
    grown = _buffer(buffer_BHNE, capacity)
    grown[:, :, : buffer_BHNE.shape[2]] = buffer_BHNE
    return grown


def _write(buffer_BHNE: Tensor, new_RHWE: Tensor, window: Window) -> Tensor:
    """Write into the buffer and return what the window's rows can attend to."""
    first, last, rows = window.first, window.last, window.rows
    if window.slots is not None:
        place_RHWE = window.slots[:, None, :, None].expand_as(new_RHWE)
        buffer_BHNE.scatter_(2, place_RHWE, new_RHWE)
        return buffer_BHNE.narrow(2, 0, last)
    # narrow() instead of slices: this runs twice a block and token, and slicing costs three times as much.
    if rows is None:
        target = buffer_BHNE.narrow(2, first, last - first)
        target.copy_(_merge(new_RHWE, target, window.valid))
        return buffer_BHNE.narrow(2, 0, last)
    if window.store_only:  # nobody attends, so the slots before the window need not be gathered
        old = buffer_BHNE.narrow(2, first, last - first)[rows]
        buffer_BHNE[rows, :, first:last] = _merge(new_RHWE, old, window.valid)
        return buffer_BHNE
    seen = buffer_BHNE.narrow(2, 0, last)[rows]
    target = seen.narrow(2, first, last - first)
    target.copy_(_merge(new_RHWE, target, window.valid))
    buffer_BHNE[rows, :, first:last] = target
    return seen


def _merge(new_RHWE: Tensor, old_RHWE: Tensor, valid_RW: Tensor | None) -> Tensor:
    if valid_RW is None:
        return new_RHWE
    return torch.where(valid_RW[:, None, :, None], new_RHWE, old_RHWE)
