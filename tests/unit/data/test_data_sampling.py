"""The samplers over all small cases, against a plain statement of what they should give."""

import itertools
import math

import pytest

from eetrain.data.sampling import FILLER, FixedSampler, ResumableBatchSampler, epoch_order
from eetrain.errors import ConfigError

SMALL = list(itertools.product(range(1, 14), range(1, 5), range(1, 4)))


def test_order_is_a_permutation_given_by_seed_and_epoch():
    orders = {}
    for seed, epoch in itertools.product(range(4), range(4)):
        order = epoch_order(50, seed, epoch).tolist()
        assert sorted(order) == list(range(50))
        assert epoch_order(50, seed, epoch).tolist() == order
        orders[seed, epoch] = tuple(order)
    assert len(set(orders.values())) == 16


@pytest.mark.parametrize(("rows", "size", "replicas"), SMALL)
def test_replicas_share_the_order_in_global_batches(rows, size, replicas):
    """Side by side the replicas' batches are the epoch's order, wrapped around until the last global batch is whole."""
    per_rank = [ResumableBatchSampler(rows, size, replicas, rank, seed=3) for rank in range(replicas)]
    for epoch in (0, 5):
        for sampler in per_rank:
            sampler.set_epoch(epoch)
        seen = [row for step in zip(*per_rank, strict=True) for batch in step for row in batch]
        steps = math.ceil(rows / (size * replicas))
        order = epoch_order(rows, 3, epoch).tolist()
        assert seen == list(itertools.islice(itertools.cycle(order), steps * size * replicas))
        assert [len(sampler) for sampler in per_rank] == [steps] * replicas


@pytest.mark.parametrize(("rows", "size", "replicas"), SMALL)
def test_drop_last_keeps_whole_global_batches_only(rows, size, replicas):
    if rows < size * replicas:
        with pytest.raises(
            ConfigError, match=f"{rows} rows do not fill one batch of {size} rows on {replicas} replicas"
        ):
            ResumableBatchSampler(rows, size, replicas, 0, drop_last=True)
        return
    per_rank = [ResumableBatchSampler(rows, size, replicas, rank, drop_last=True) for rank in range(replicas)]
    seen = [row for step in zip(*per_rank, strict=True) for batch in step for row in batch]
    assert seen == epoch_order(rows, 0, 0).tolist()[: rows // (size * replicas) * size * replicas]


def test_every_position_continues_with_the_batches_that_are_left():
    whole = ResumableBatchSampler(11, 2, seed=7)
    whole.set_epoch(3)
    batches = list(whole)
    for start in range(len(batches) + 1):
        resumed = ResumableBatchSampler(11, 2, seed=7)
        resumed.load_state_dict({**whole.state_dict(), "batches": start})
        assert resumed.state_dict() == {**whole.state_dict(), "batches": start}
        assert list(resumed) == batches[start:]
        assert len(resumed) == len(batches), "the length is that of the epoch, wherever it starts"
        resumed.set_epoch(3)
        assert list(resumed) == batches[start:], "announcing the present epoch keeps the position"
        resumed.set_epoch(4)
        assert len(list(resumed)) == len(batches), "another epoch starts at its beginning"


def test_without_shuffle_the_rows_keep_their_order():
    sampler = ResumableBatchSampler(5, 2, shuffle=False)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == [[0, 1], [2, 3], [4, 0]]


def test_state_of_two_replicas_continues_on_one_with_the_same_global_batch():
    pair = [ResumableBatchSampler(20, 2, 2, rank) for rank in (0, 1)]
    rest = [a + b for a, b in zip(*pair, strict=True)][2:]
    alone = ResumableBatchSampler(20, 4)
    alone.load_state_dict({**pair[1].state_dict(), "batches": 2})
    assert list(alone) == rest


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ResumableBatchSampler(21, 4), "num_rows 20, this run has num_rows 21"),
        (ResumableBatchSampler(20, 4, seed=1), "seed 0, this run has seed 1"),
        (ResumableBatchSampler(20, 5), "global_batch_size 4, this run has global_batch_size 5"),
    ],
)
def test_other_data_cannot_continue_an_epoch_but_can_start_one(other, message):
    state = ResumableBatchSampler(20, 4).state_dict()
    with pytest.raises(ConfigError, match=f"in the middle of an epoch with {message}") as caught:
        other.load_state_dict({**state, "batches": 1})
    assert "epoch's end" in caught.value.hint
    other.load_state_dict({**state, "epoch": 2})
    assert (other.epoch, other.start) == (2, 0)


@pytest.mark.parametrize(("rows", "replicas"), itertools.product(range(1, 14), range(1, 5)))
def test_evaluation_shows_each_row_once_on_equally_long_replicas(rows, replicas):
    per_rank = [list(FixedSampler(rows, replicas, rank)) for rank in range(replicas)]
    in_turn = [row for step in zip(*per_rank, strict=True) for row in step]
    assert in_turn == list(range(rows)) + [FILLER] * (-rows % replicas)
    assert {len(FixedSampler(rows, replicas, rank)) for rank in range(replicas)} == {len(per_rank[0])}
