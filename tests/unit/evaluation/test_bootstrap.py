"""Resampling against loops that draw prompt by prompt, and against closed forms."""

from math import sqrt

import numpy as np
import pytest
import sacrebleu

from eetrain.evaluation import Bootstrap
from eetrain.evaluation.bootstrap import described, mean, ratio
from eetrain.evaluation.quality import bleu_sums

WORDS = ["the", "a", "cat", "dog", "sat", "barks", "on", "mat", "night", "today", "very", "loud"]


def sentences(seed: int, count: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(6, 12))) for _ in range(count)]


def drawn(bootstrap: Bootstrap) -> list[list[int]]:
    """The prompts of each draw, one by one."""
    return [[n for n, count in enumerate(row) for _ in range(int(count))] for row in bootstrap.counts_RN]


def test_draws_are_as_many_prompts_with_replacement_each_as_likely() -> None:
    draws = drawn(Bootstrap(5, resamples=4000))
    assert all(len(draw) == 5 for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=5) / 4000
    assert counts == pytest.approx([1] * 5, abs=5 * sqrt(0.8 / 4000))
    assert any(len(set(draw)) < 5 for draw in draws)
    # Of five draws with replacement, 1 - (4/5)^5 hold a given prompt.
    held = np.mean([0 in draw for draw in draws])
    assert held == pytest.approx(1 - 0.8**5, abs=0.035)


def test_equal_seeds_give_equal_draws_and_others_do_not() -> None:
    assert np.array_equal(Bootstrap(9, seed=3).counts_RN, Bootstrap(9, seed=3).counts_RN)
    assert not np.array_equal(Bootstrap(9, seed=3).counts_RN, Bootstrap(9, seed=4).counts_RN)


def test_bleu_of_every_draw_is_that_of_sacrebleu_on_the_drawn_texts() -> None:
    texts = sentences(0, 6)
    references = [[one, other] for one, other in zip(sentences(1, 6), texts[1:] + texts[:1], strict=True)]
    references[2] = references[2][:1]
    references[4].append(texts[4])
    bootstrap = Bootstrap(6, resamples=40)
    found = bootstrap(bleu_sums(texts, references))
    for value, draw in zip(found.values_R, drawn(bootstrap), strict=True):
        streams = [[references[n][place] if place < len(references[n]) else None for n in draw] for place in range(3)]
        streams = [stream for stream in streams if any(stream)]
        assert value == sacrebleu.corpus_bleu([texts[n] for n in draw], streams).score
    assert len(set(found.values_R)) > 20


def test_means_and_ratios_of_every_draw() -> None:
    above, below = [3.0, 1.0, 4.0, 1.5], [2.0, 7.0, 1.0, 8.0]
    bootstrap = Bootstrap(4, resamples=50)
    one, two = bootstrap(mean(above)), bootstrap(ratio(above, below))
    assert (one.value, two.value) == (9.5 / 4, 9.5 / 18)
    for place, draw in enumerate(drawn(bootstrap)):
        assert one.values_R[place] == pytest.approx(sum(above[n] for n in draw) / 4)
        assert two.values_R[place] == pytest.approx(sum(above[n] for n in draw) / sum(below[n] for n in draw))


def test_differences_are_paired_draw_by_draw() -> None:
    generator = np.random.default_rng(0)
    baseline = generator.normal(50, 20, size=40)
    bootstrap = Bootstrap(40)
    before, after = bootstrap(mean(list(baseline))), bootstrap(mean(list(baseline + 1)))
    low, high = before.interval
    assert high - low > 5, "each alone moves a lot with the prompts"
    assert after.minus(before).interval == pytest.approx((1, 1)), "but their difference does not"
    assert after.minus(before).share_worse() == 0
    assert after.minus(before).share_worse(lower_is_better=True) == 1


def test_a_system_differs_from_itself_by_exactly_nothing() -> None:
    bootstrap = Bootstrap(6)
    texts = sentences(0, 6)
    own = bootstrap(bleu_sums(texts, [[text] for text in sentences(1, 6)]))
    difference = own.minus(own)
    assert (difference.value, difference.interval, difference.share_worse()) == (0, (0, 0), 0)
    assert difference.share_worse(lower_is_better=True) == 0, "ties are not worse"


def test_interval_of_a_mean_is_that_of_normal_theory() -> None:
    values = np.random.default_rng(1).normal(10, 3, size=500)
    low, high = Bootstrap(500, resamples=4000)(mean(list(values))).interval
    half = 1.96 * values.std() / sqrt(500)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_share_worse_is_that_of_normal_theory() -> None:
    generator = np.random.default_rng(2)
    noise = generator.normal(0, 1, size=400)
    deltas = noise - noise.mean() - noise.std() / sqrt(400)  # one standard error below zero
    difference = Bootstrap(400, resamples=4000)(mean(list(deltas)))
    assert difference.share_worse() == pytest.approx(0.841, abs=0.03)


def test_draws_without_anything_to_score_are_left_out() -> None:
    found = Bootstrap(2)(ratio([6.0, 0.0], [3.0, 0.0]))
    assert np.isnan(found.values_R).any(), "a quarter of the draws takes the empty prompt twice"
    assert found.interval == (2, 2)
    assert found.minus(Bootstrap(2)(ratio([9.0, 0.0], [3.0, 0.0]))).share_worse() == 1


def test_one_prompt_has_a_value_and_no_interval() -> None:
    own = Bootstrap(1)(mean([4.0]))
    assert (own.value, own.interval, own.minus(own).share_worse()) == (4, (None, None), None)
    assert described(1) is None
    assert described(2) == {
        "method": "paired bootstrap over prompts",
        "confidence": 0.95,
        "resamples": 1000,
        "seed": 0,
    }
