"""The cache addressed by slot: what a window writes, what its rows see, how buffers grow and rows leave."""

from __future__ import annotations

import pytest
import torch

from eetrain.decoding.cache import KeysStoredError, SlotCache, Window


def numbers(rows: int, slots: int, start: int = 0) -> torch.Tensor:
    """Keys ``[R, 1, W, 1]`` that tell row and slot: 100 * row + slot + start."""
    return (100.0 * torch.arange(rows)[:, None] + torch.arange(slots) + start)[:, None, :, None]


def test_all_rows_append():
    cache = SlotCache(1)
    cache.window = Window(0, 3)
    keys, values = cache.update(numbers(2, 3), -numbers(2, 3), 0)
    assert torch.equal(keys, numbers(2, 3))
    cache.window = Window(3, 4)
    assert cache.get_seq_length(0) == 3
    assert cache.get_mask_sizes(1, 0) == (4, 0)
    keys, values = cache.update(numbers(2, 1, 3), -numbers(2, 1, 3), 0)
    assert torch.equal(keys, numbers(2, 4))
    assert torch.equal(values, -numbers(2, 4))


def test_some_rows_write_and_see_only_their_own():
    cache = SlotCache(1)
    cache.window = Window(0, 2)
    cache.update(numbers(3, 2), numbers(3, 2), 0)
    cache.window = Window(2, 3, rows=torch.tensor([0, 2]))
    keys, _ = cache.update(numbers(3, 1, 2)[[0, 2]], numbers(3, 1, 2)[[0, 2]], 0)
    assert torch.equal(keys, numbers(3, 3)[[0, 2]])
    held = cache.layers[0].keys
    assert torch.equal(held[[0, 2], :, :3], numbers(3, 3)[[0, 2]])
    assert held[1, 0, 2, 0] == 0, "row 1 must be untouched"


@pytest.mark.parametrize("rows", [None, [0, 1]])
def test_slots_that_are_deeper_already_are_not_overwritten(rows):
    cache = SlotCache(1)
    cache.window = Window(0, 3)
    cache.update(numbers(2, 3), numbers(2, 3), 0)
    valid = torch.tensor([[False, True], [True, True]])
    index = None if rows is None else torch.tensor(rows)
    cache.window = Window(1, 3, rows=index, valid=valid)
    garbage = torch.full((2, 1, 2, 1), 7.0)
    keys, _ = cache.update(garbage, garbage, 0)
    assert keys[:, 0, :, 0].tolist() == [[0, 1, 7], [100, 7, 7]]
    assert cache.layers[0].keys[:, 0, :3, 0].tolist() == [[0, 1, 7], [100, 7, 7]]


@pytest.mark.parametrize("rows", [None, [1]])
def test_a_store_only_window_writes_then_stops_the_block(rows):
    cache = SlotCache(1)
    cache.window = Window(0, 2)
    cache.update(numbers(2, 2), numbers(2, 2), 0)
    index = None if rows is None else torch.tensor(rows)
    cache.window = Window(2, 3, rows=index, store_only=True)
    new = numbers(2, 1, 2) if rows is None else numbers(2, 1, 2)[rows]
    with pytest.raises(KeysStoredError):
        cache.update(new, -new, 0)
    want = torch.tensor([2.0, 102.0]) if rows is None else torch.tensor([0.0, 102.0])
    assert torch.equal(cache.layers[0].keys[:, 0, 2, 0], want)
    assert torch.equal(cache.layers[0].values[:, 0, 2, 0], -want)


def test_buffers_grow_and_keep_what_they_hold():
    cache = SlotCache(1)
    for slot in range(300):
        cache.window = Window(slot, slot + 1)
        keys, _ = cache.update(numbers(2, 1, slot), numbers(2, 1, slot), 0)
    assert torch.equal(keys, numbers(2, 300))
    assert 300 <= cache.layers[0].keys.shape[2] < 600


def test_rows_that_end_are_dropped_from_every_layer():
    cache = SlotCache(3)
    cache.window = Window(0, 2)
    for layer in (0, 1):
        cache.update(numbers(3, 2), numbers(3, 2), layer)
    cache.keep(torch.tensor([2, 0]))
    for layer in (0, 1):
        assert torch.equal(cache.layers[layer].keys[:, :, :2], numbers(3, 2)[[2, 0]])
    assert not cache.layers[2].is_initialized


def test_layers_do_not_slide():
    """transformers sizes masks by the layers' kind: windows are left to the masks."""
    cache = SlotCache(2)
    assert cache.is_sliding == [False, False]
    assert cache.layers[0].get_max_length() == -1
