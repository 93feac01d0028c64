"""Cutting, packing, collating, and the proof that packed documents do not see each other."""

import itertools
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eetrain.data.batches import FillPacked, PadLeft, PadRight, TokenRows
from eetrain.data.packing import best_fit_decreasing, cut
from eetrain.data.sampling import FILLER
from eetrain.data.tokenization import Example, TokenTable


def _document(number: int, length: int, prompt: int = 1) -> Example:
    """Ids 100 * number + position: each tells where it came from."""
    return Example([100 * number + i for i in range(length)], [i >= prompt for i in range(length)], f"f:{number}")


def _table(*lengths: int, prompt: int = 1) -> TokenTable:
    return TokenTable(_document(n, length, prompt) for n, length in enumerate(lengths, start=1))


@pytest.mark.parametrize("max_length", range(2, 9))
@pytest.mark.parametrize("length", range(0, 15))
def test_split_scores_every_token_but_the_first_exactly_once(length, max_length):
    table = _table(length)
    pieces = cut(table, [0], max_length, "split")
    rows = TokenRows(table, pieces)
    labels = [label for row in rows for label in row.labels.tolist() if label != -100]
    assert labels == list(range(101, 100 + length))
    assert all(2 <= n <= max_length for n in pieces.lengths)
    assert all(row.labels[0] == -100 for row in rows)
    assert all(torch.equal(row.ids[1:], row.labels[1:]) for row in rows)
    assert pieces.skipped == (length < 2)


@pytest.mark.parametrize(("length", "prompt"), itertools.product(range(1, 10), range(1, 10)))
def test_truncate_keeps_the_start_and_skips_what_has_no_scored_token_left(length, prompt):
    table = _table(length, prompt=prompt)
    pieces = cut(table, [0], 5, "truncate")
    kept = min(length, 5)
    if prompt >= kept:
        assert (len(pieces.spans), pieces.skipped) == (0, 1)
        return
    assert (pieces.spans.tolist(), pieces.skipped) == ([[0, kept]], 0)
    [row] = TokenRows(table, pieces)
    assert row.ids.tolist() == [100 + i for i in range(kept)]
    assert row.labels.tolist() == [-100] * prompt + [100 + i for i in range(prompt, kept)]


def test_only_the_chosen_documents_are_cut():
    table = _table(3, 4, 5)
    assert cut(table, [2, 0], 9, "split").spans.tolist() == [[7, 12], [0, 3]]


def _best_fit_by_definition(lengths, capacity):
    bins = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [capacity - sum(lengths[i] for i in b) for b in bins]
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[item]]
        if not fitting:
            bins.append([item])
        else:
            bins[min(fitting, key=lambda b: room[b])].append(item)
    return bins


def test_best_fit_against_its_definition():
    random.seed(0)
    for _ in range(200):
        capacity = random.randint(1, 20)
        lengths = [random.randint(1, capacity) for _ in range(random.randint(0, 30))]
        bins = best_fit_decreasing(lengths, capacity)
        room = [capacity - sum(lengths[i] for i in b) for b in bins]
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        assert min(room, default=0) >= 0
        assert all(bins)
        # Which of two equally full bins takes an item is a convention; how full the bins become is not.
        other = _best_fit_by_definition(lengths, capacity)
        assert sorted(room) == sorted(capacity - sum(lengths[i] for i in b) for b in other)


def test_best_fit_by_hand():
    assert best_fit_decreasing([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]


def test_packed_batch_by_hand():
    table = _table(3, 4, 2)
    rows = TokenRows(table, cut(table, range(3), 8, "split"), max_length=8)
    batch = FillPacked(pad_id=9, max_length=8)([rows[0], rows[1]])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[200, 201, 202, 203, 100, 101, 102, 9], [300, 301, 9, 9, 9, 9, 9, 9]],
        "labels": [[-100, 201, 202, 203, -100, 101, 102, -100], [-100, 301, -100, -100, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]],
    }
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert len(rows) == 2


def test_padded_batch_and_filler_by_hand():
    table = _table(3, 2)
    rows = TokenRows(table, cut(table, range(2), 8, "split"))
    batch = PadRight(pad_id=9)([rows[0], rows[1], rows[FILLER]])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[100, 101, 102], [200, 201, 9], [100, 101, 102]],
        "labels": [[-100, 101, 102], [-100, 201, -100], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0], [1, 1, 1]],
    }
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_prompts_are_padded_on_the_left():
    batch = PadLeft(pad_id=9)([(4, [1, 2, 3]), (5, [7])])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[1, 2, 3], [9, 9, 7]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "index": [4, 5],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_have_the_logits_they_have_alone(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation=attention, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    lengths = [5, 1, 7, 3, 2, 6, 4]
    examples = [Example(torch.randint(3, 50, (n,)).tolist(), [True] * n, "f:1") for n in lengths]
    examples = [Example(e.ids, [False, *e.scored[1:]], e.origin) for e in examples]
    table = TokenTable(examples)
    rows = TokenRows(table, cut(table, range(len(lengths)), 12, "split"), max_length=12)
    batch = FillPacked(pad_id=0, max_length=12)([rows[i] for i in range(len(rows))])
    checked = 0
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for ids, positions, logits in zip(batch["input_ids"], batch["position_ids"], packed, strict=True):
            starts = [*torch.nonzero(positions == 0).flatten().tolist(), 12]
            for start, end in itertools.pairwise(starts):
                alone = model(ids[None, start:end], use_cache=False).logits[0]
                assert torch.allclose(logits[start:end], alone, rtol=0, atol=1e-10)
                checked += start > 0
        together = model(batch["input_ids"], use_cache=False).logits
    assert checked > 3
    assert (packed - together).abs().max() > 1e-3, "without position_ids the documents do see each other"
