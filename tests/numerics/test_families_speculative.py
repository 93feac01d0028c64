"""Self-speculation in every family: tokens are those of the full depth, the cache is that of a full forward."""

from __future__ import annotations

import itertools

import pytest
import torch
from families_support import ALL
from speculative_support import agreeing, check_cache, decoded, rounds

HEADS = ("tied", "norm", "mlp", "block")
POLICIES = {
    "chain": "speculative:exit=2,draft=4",
    "stopped": "speculative:exit=1,draft=5,stop=0.04",
    "cascade": "speculative:exit=1+3,draft=2+4",
    "auto": "speculative:draft=4",
}


def check(family: str, head: str, policy: str, rows: int, new: int = 20, **options):
    model = agreeing(family, head)
    want = decoded(model, "never", rows, new, **options)
    got = decoded(model, policy, rows, new, **options)
    assert torch.equal(got.sequences, want.sequences)
    return got.speculation


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("policy", list(POLICIES.values()), ids=list(POLICIES))
def test_tokens_are_those_of_the_full_depth(family, policy):
    found = check(family, "norm", policy, rows=4)
    assert 0 < found.accepted < found.judged, "drafts must stand and fall, or the test shows little"


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", HEADS)
def test_with_every_head(family, head):
    check(family, head, POLICIES["chain"], rows=2, new=12)


@pytest.mark.parametrize("family", ALL)
def test_the_cache_is_that_of_one_full_forward_after_every_round(family):
    model = agreeing(family, "block" if family == "gemma3_text" else "norm")
    lengths = []

    def after_round(runner):
        lengths.append(set(runner.rows.complete))
        check_cache(model, runner)

    rounds(model, "speculative:exit=2,draft=4", 4, 16, after_round)
    assert any(len(found) > 1 for found in lengths), "rows must get unequally far, or the test shows little"


def test_the_cache_of_a_cascade():
    model = agreeing("llama")
    rounds(model, "speculative:exit=1+2+3,draft=2+3+5", 4, 16, lambda runner: check_cache(model, runner))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_both_attentions(family, attention):
    model = agreeing(family)
    before = model.causal_lm.config._attn_implementation
    try:
        model.causal_lm.set_attn_implementation(attention)
        check(family, "norm", POLICIES["chain"], rows=3)
    finally:
        model.causal_lm.set_attn_implementation(before)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral"])
def test_up_to_the_last_position_of_the_model(family):
    """64 positions: the last drafts would lie beyond them."""
    found = check(family, "norm", "speculative:exit=2,draft=7", rows=3, new=55)
    assert found.accepted


@pytest.mark.parametrize("draft", range(1, 9))
def test_every_draft_length(draft):
    check("llama", "norm", f"speculative:exit=2,draft={draft}", rows=3)


@pytest.mark.parametrize("rows", range(1, 9))
def test_every_batch_size(rows):
    check("qwen3", "norm", "speculative:exit=2,draft=4", rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("exit", [1, 2, 3])
def test_everything(family, head, exit):
    """Every exit, drafts of 1 to 8, batches of 1 to 8."""
    for draft, rows in itertools.product(range(1, 9), (1, 2, 5, 8)):
        check(family, head, f"speculative:exit={exit},draft={draft}", rows=rows)
