"""What a round computes: how many blocks, none twice; that faults in it are seen; that sampling is exact."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from speculative_support import agreeing, check_cache, decoded, prompts, rounds

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import blocks_of
from eetrain.decoding import parse_policy
from eetrain.decoding.cache import SlotLayer
from eetrain.decoding.speculation.levels import DraftLevels
from eetrain.decoding.speculation.rows import RaggedRows
from eetrain.decoding.speculation.runner import SpeculativeRunner
from eetrain.testing.statistics import chi_square_p
from eetrain.testing.tiny import tiny_model


@pytest.mark.parametrize("exit", [1, 2, 3])
@pytest.mark.parametrize("draft", [1, 3, 6])
def test_block_evaluations_of_a_round_are_the_formula(exit, draft):
    """``E (g + 1)`` shallow and ``(L - E)(g + 1)`` deep ones, counted at the blocks themselves."""
    model, calls = agreeing("llama"), Counter()
    handles = [
        block.register_forward_pre_hook(lambda module, args, number=number: calls.update({number: args[0].shape[1]}))
        for number, block in enumerate(blocks_of(model.backbone, model.anatomy), start=1)
    ]
    try:
        batch = prompts(1)
        runner = SpeculativeRunner(model, parse_policy(f"speculative:exit={exit},draft={draft}"), **batch)
        with torch.inference_mode():
            logits, _ = runner.prefill()
            runner.feed(logits.float().argmax(-1))
            calls.clear()
            before = 0
            for _ in range(4):
                runner.round([20])
                assert dict(calls) == dict.fromkeys(range(1, 5), draft + 1)
                assert runner.block_calls - before == exit * (draft + 1) + (4 - exit) * (draft + 1)
                before = runner.block_calls
                calls.clear()
    finally:
        for handle in handles:
            handle.remove()


CHAIN = "speculative:exit=2,draft=4"
CASCADE = "speculative:exit=1+2+3,draft=2+3+4"


@pytest.mark.parametrize("policy", [CHAIN, CASCADE])
def test_no_block_sees_the_same_token_in_the_same_place_twice(policy):
    """Batch of one: a block runs over a slot anew only if a token up to that slot was taken back."""
    model, seen, total = agreeing("llama"), Counter(), []
    advance_, put_ = DraftLevels.advance, DraftLevels.put

    def put(self, row, slots, level):
        put_(self, row, slots, level)
        for block, text in [key for key in seen if len(key[1]) >= slots]:
            del seen[block, text]

    def advance(self, level):
        lacking = range(self.reached[level][0], self.known[0])
        for slot in lacking:
            text = tuple(self.rows.ids[0, : slot + 1].tolist())
            start = self.depths[level - 1] if level else 0
            keys = [(block, text) for block in range(start + 1, self.depths[level] + 1)]
            seen.update(keys)
            total.extend(keys)
            assert all(seen[key] == 1 for key in keys)
        return advance_(self, level)

    with mock.patch.object(DraftLevels, "advance", advance), mock.patch.object(DraftLevels, "put", put):
        runner = rounds(model, policy, 1, 24, lambda runner: None)
    assert len(total) == runner.block_calls, "what the runner counts is what it ran"
    if policy == CHAIN:
        assert len(set(total)) == len(total), "with one exit nothing that was taken back can come again"


def check_all() -> None:
    """What other tests check, for a chain and a cascade."""
    model = agreeing("llama")
    for policy in (CHAIN, CASCADE):
        rounds(model, policy, 3, 16, lambda runner: check_cache(model, runner))
        assert torch.equal(decoded(model, policy, 3).sequences, decoded(model, "never", 3).sequences)


def faulty_update(drop_layer: int):
    original = SlotLayer.update

    def update(self, keys, values, *args, **kwargs):
        result = original(self, keys, values, *args, **kwargs)
        if self is self.cache.layers[drop_layer] and self.cache.window.first > 12:
            self.keys[:, :, self.cache.window.first] = 0
        return result

    return update


FAULTS = {
    "one key is missing": lambda: mock.patch.object(SlotLayer, "update", faulty_update(1)),
    "one key of a verifying block is missing": lambda: mock.patch.object(SlotLayer, "update", faulty_update(3)),
    "positions are off by one": lambda: mock.patch.object(
        RaggedRows, "positions_in", lambda self, slots: slots + self._offset_B1 + 1
    ),
    "what fell is not cut": lambda: mock.patch.object(
        DraftLevels, "put", lambda self, row, slots, level: self.known.__setitem__(row, slots)
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS.values()), ids=list(FAULTS))
def test_faults_are_seen_by_the_cache_or_the_tokens(fault):
    """Each of these makes the checks of the other tests fail."""
    check_all()
    with fault(), pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_all()


def test_an_exit_at_the_last_block_drafts_what_always_stands():
    model = MultiExitModel(tiny_model("llama", eos_token_id=None), ExitConfig(layers=[2, 4], head="tied")).eval()
    got = decoded(model, "speculative:exit=4,draft=3", 2)
    assert torch.equal(got.sequences, decoded(model, "never", 2).sequences)
    assert got.speculation.accepted == got.speculation.judged == got.speculation.drafted > 0


VOCABULARY = 8


def sampled_model() -> MultiExitModel:
    backbone = tiny_model("llama", vocab_size=VOCABULARY, eos_token_id=None, dtype=torch.float64)
    model = MultiExitModel(backbone, ExitConfig(layers=[1, 2, 3], head="norm")).eval()
    return model


@torch.no_grad()
def exact(model: MultiExitModel, prompt: torch.Tensor, new: int, temperature: float, top_p: float) -> torch.Tensor:
    """Probability of every continuation of ``new`` tokens, from the plain model."""
    texts, weights = prompt, torch.ones(1, dtype=torch.float64)
    for _ in range(new):
        logits = model.causal_lm(texts).logits[:, -1] / temperature
        p = logits.softmax(-1)
        if top_p < 1:
            ordered, order = p.sort(-1, descending=True)
            keep = ordered.cumsum(-1) - ordered < top_p
            p = torch.zeros_like(p).scatter(1, order, ordered * keep)
            p = p / p.sum(-1, keepdim=True)
        weights = (weights[:, None] * p).flatten()
        tokens = torch.arange(VOCABULARY).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(VOCABULARY, 0), tokens], 1)
    return weights


@pytest.mark.parametrize(
    ("policy", "temperature", "top_p"),
    [
        ("speculative:exit=1,draft=2", 1.0, 1.0),
        ("speculative:exit=2,draft=2", 1.7, 0.8),
        ("speculative:exit=2,draft=3,stop=0.3", 1.0, 1.0),
        ("speculative:exit=1,draft=3,stop=thompson", 1.3, 1.0),
        ("speculative:exit=1,draft=3,stop=calibrated", 1.0, 0.9),
        ("speculative:exit=1+3,draft=1+2", 1.0, 1.0),
    ],
)
def test_sampled_texts_are_distributed_as_those_of_the_full_depth(policy, temperature, top_p):
    model, new, draws = sampled_model(), 3, 4000
    prompt = torch.tensor([[1, 4, 6, 3]])
    torch.manual_seed(0)
    out = model.generate(
        prompt,
        exit_policy=policy,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=new,
        num_return_sequences=draws,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, prompt.shape[1] :]
    place = (tokens * torch.tensor([VOCABULARY**2, VOCABULARY, 1])).sum(1)
    expected = exact(model, prompt, new, temperature, top_p) * draws
    observed = torch.bincount(place, minlength=VOCABULARY**new).double()
    rare = expected < 5
    pooled_observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    pooled_expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert chi_square_p(pooled_observed, pooled_expected) > 1e-3
    assert 0 < out.speculation.accepted < out.speculation.judged
