"""What surrounds the rounds: processors, criteria, streamers and outputs are those of the loop token by token."""

from __future__ import annotations

import pytest
import torch
from speculative_support import agreeing, decoded, prompts
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from eetrain import ExitConfig, MultiExitModel
from eetrain.data.tokenization import Example
from eetrain.decoding import Never, Speculation, Speculative, parse_policy, start
from eetrain.errors import ConfigError, UnsupportedModelError
from eetrain.evaluation.forced import forced_nll
from eetrain.evaluation.samples import Sample
from eetrain.testing.tiny import tiny_model

POLICY = "speculative:exit=2,draft=4"
ROWS = 4


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return agreeing("llama")


def both(model, **options):
    return decoded(model, "never", ROWS, **options), decoded(model, POLICY, ROWS, **options)


OPTIONS = {
    "plain": {},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5], [7, 8], [12, 12]]},
    "sequence_bias": {"sequence_bias": [[[9], 2.0], [[20, 21], -3.0]]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(3, 30))},
    "min_length": {"min_length": 14, "eos_token_id": list(range(3, 30))},
    "forced_eos_token_id": {"forced_eos_token_id": 17},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 33},
    "suppress_tokens": {"suppress_tokens": [4, 12, 35]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [4, 12, 35]},
    "ends": {"eos_token_id": list(range(3, 16))},
    "ends at once": {"eos_token_id": list(range(61))},
    "max_length": {"max_length": 13, "max_new_tokens": None},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "eos_token_id": [12, 30]},
}


@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_tokens_scores_and_logits_are_those_of_the_loop_token_by_token(model, options):
    wanted = {"output_scores": True, "output_logits": True}
    want, got = both(model, **options, **wanted)
    assert torch.equal(got.sequences, want.sequences)
    new = got.sequences.shape[1] - prompts(ROWS)["input_ids"].shape[1]
    assert len(got.scores) == len(got.logits) == new
    running = want.exit_trace > 0
    assert torch.equal(got.exit_trace > 0, running)
    for at in range(new):
        rows = running[:, at]
        torch.testing.assert_close(got.logits[at][rows], want.logits[at][rows], rtol=0, atol=1e-5)
        torch.testing.assert_close(got.scores[at][rows], want.scores[at][rows], rtol=0, atol=1e-5)
    assert not got.sequences.is_inference()
    assert not got.logits[0].is_inference()


def test_the_trace_says_where_tokens_come_from(model):
    _, got = both(model)
    assert set(got.exit_trace.unique().tolist()) == {4}, "whatever drafted it, a token has run all blocks"
    assert set(got.draft_trace.unique().tolist()) == {0, 2}
    assert 0 < int((got.draft_trace == 2).sum()) <= got.speculation.accepted
    assert (got.draft_trace[:, 0] == 0).all(), "the prompt's pass gives the first token"
    cascade = decoded(model, "speculative:exit=1+3,draft=2+4", ROWS)
    assert set(cascade.draft_trace.unique().tolist()) == {0, 1, 3}


def test_counts(model):
    _, got = both(model)
    found = got.speculation
    assert 0 < found.accepted < found.judged <= found.drafted
    assert found.row_rounds <= ROWS * found.rounds
    assert found.acceptance == found.accepted / found.judged
    assert found.tokens_per_round == 1 + found.accepted / found.row_rounds
    assert found + found == Speculation(*(2 * value for value in vars(found).values()))
    assert Speculation().acceptance != Speculation().acceptance
    assert both(model)[0].speculation is None


class Collect:
    def __init__(self) -> None:
        self.values, self.depths, self.ended = [], [], 0

    def put(self, value):
        assert not self.ended
        self.values.append(value.clone())

    def put_depths(self, depths):
        self.depths.append(depths.clone())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("ends", [None, list(range(3, 16))])
def test_a_streamer_sees_what_it_sees_token_by_token(model, ends):
    ours, theirs = Collect(), Collect()
    decoded(model, "never", ROWS, streamer=theirs, eos_token_id=ends)
    got = decoded(model, POLICY, ROWS, streamer=ours, eos_token_id=ends)
    assert len(ours.values) == len(theirs.values)
    assert all(torch.equal(one, two) for one, two in zip(ours.values, theirs.values, strict=True))
    assert ours.ended == theirs.ended == 1
    chosen = torch.where(got.draft_trace > 0, got.draft_trace, got.exit_trace)
    assert torch.equal(torch.stack(ours.depths, 1), chosen)


class StopOn(StoppingCriteria):
    def __init__(self, below: int) -> None:
        self.below = below

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] < self.below


@pytest.mark.parametrize("ends", [None, [12]])
@pytest.mark.parametrize("below", [4, 15, 30, 61])
def test_criteria_of_ones_own(model, ends, below):
    """Without an end token all rows go on until the last of them is stopped, as in transformers."""
    criteria = StoppingCriteriaList([StopOn(below)])
    want, got = both(model, stopping_criteria=criteria, eos_token_id=ends)
    assert torch.equal(got.sequences, want.sequences)


class Even(LogitsProcessor):
    """A function of one row's ids and scores."""

    def __call__(self, input_ids, scores):
        banned = torch.arange(scores.shape[-1]) % 2 == input_ids[:, -1:] % 2
        return scores.masked_fill(banned, -torch.inf)


class Draftable(Even):
    draftable = True


def test_a_processor_of_ones_own_has_to_say_that_it_remembers_nothing(model):
    with pytest.raises(ConfigError, match="Even cannot be applied to drafted tokens") as caught:
        decoded(model, POLICY, ROWS, logits_processor=LogitsProcessorList([Even()]))
    assert "draftable = True" in caught.value.hint
    want, got = both(model, logits_processor=LogitsProcessorList([Draftable()]))
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prefix_allowed_tokens_fn": lambda row, ids: [9]}, "PrefixConstrainedLogitsProcessor"),
        ({"encoder_no_repeat_ngram_size": 2}, "EncoderNoRepeatNGramLogitsProcessor"),
        ({"encoder_repetition_penalty": 1.5}, "EncoderRepetitionPenaltyLogitsProcessor"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    ],
)
def test_processors_that_remember_or_are_bound_to_rows_are_refused(model, options, name):
    with pytest.raises(ConfigError, match=f"{name} cannot be applied to drafted tokens"):
        decoded(model, POLICY, ROWS, **options)


def test_sampling_with_every_processor_of_sampling_runs(model):
    options = {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "epsilon_cutoff": 1e-3}
    got = decoded(model, POLICY, ROWS, do_sample=True, **options)
    assert got.sequences.shape[1] == prompts(ROWS)["input_ids"].shape[1] + 20
    assert torch.equal(decoded(model, POLICY, ROWS, do_sample=True, **options).sequences, got.sequences), "seeded"


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        ("speculative:exit=5", "the model has no exit after block 5", "Exits stand after blocks 1, 2, 3."),
        ("speculative:exit=2,draft=0", "draft=0, must be at least 1", "Use never"),
        ("speculative:exit=3+1", "exit=3.1: a draft goes from shallow exits to deeper ones", "exit=3.6"),
        ("speculative:exit=1+2,draft=1+2+3", "has 3 draft lengths", "one for each"),
        ("speculative:exit=2,draft=64", "drafts 64 tokens, but the model has 64 positions", "Lower draft"),
        ("speculative:exit=2,stop=2", "stop=2.0 is no rule for ending a draft", "thompson"),
        ("speculative:exit=two", "exit='two' is not readable", "speculative:exit=3"),
        ("speculative:exit=2,stop=never", "stop='never' is not readable", "speculative:exit=3"),
    ],
)
def test_bad_policies(model, text, reason, hint):
    with pytest.raises(ConfigError, match=reason) as caught:
        decoded(model, text, 1)
    assert hint.replace("exit=3.6", "exit=3+6") in caught.value.hint


def test_models_it_cannot_run():
    none = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[]))
    with pytest.raises(ConfigError, match="no exit below its last block"):
        decoded(none, "speculative", 1)
    block = agreeing("llama", "block")
    for text in ("speculative:exit=1+2", "speculative"):
        with pytest.raises(ConfigError, match="block heads need keys and values of every token"):
            decoded(block, text, 1)
    flash = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[2]))
    flash.causal_lm.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="attn_implementation='flash_attention_2' does not take"):
        start(flash, POLICY, torch.ones(1, 3, dtype=torch.int64))


def test_strings_are_read_back_as_written():
    for text in (
        "speculative",
        "speculative:exit=3",
        "speculative:exit=3+6,draft=2+8",
        "speculative:exit=3,draft=6,stop=0.4",
        "speculative:draft=8,stop=thompson",
        "speculative:exit=2,stop=calibrated",
    ):
        assert str(parse_policy(text)) == text
        assert parse_policy(text) == parse_policy(text)
    assert Speculative((3,)).lossless
    assert Never().lossless
    assert not parse_policy("always:3").lossless


def test_given_texts_have_the_likelihood_of_the_full_depth(model):
    ids = tuple(range(10, 22))
    example = Example(list(ids), [False] * 4 + [True] * 8, "here")
    samples = [Sample(ids[:4], (), (example,))]
    assert forced_nll(model, POLICY, samples) == forced_nll(model, "never", samples)
