"""Extra micro-batches: how many, that they fit, and that their gradients stay right."""

import random
import statistics
from itertools import product
from math import floor

import pytest

from eetrain.errors import ConfigError
from eetrain.planning.bubbles import cooldown_extras, term_counts, term_divisors, warmup_extras
from eetrain.planning.schedule import one_forward_one_backward
from eetrain.planning.simulation import StageTimes, simulate


def test_the_numbers_of_the_method():
    assert warmup_extras(4, 2) == (2, 1, 0, 0)
    assert warmup_extras(8, 2) == (4, 3, 2, 1, 0, 0, 0, 0)
    assert cooldown_extras(4, 2) == (0, 0, 1, 2)
    assert warmup_extras(8, 2, most=2) == (2, 2, 2, 1, 0, 0, 0, 0)
    assert cooldown_extras(8, 2, most=2) == (0, 0, 1, 2, 2, 2, 2, 2)
    assert warmup_extras(1, 2) == cooldown_extras(1, 2) == (0,)
    for stages in range(1, 12):
        for ratio in (0.5, 1, 1.5, 2, 3):
            assert warmup_extras(stages, ratio)[0] == floor((stages - 1) / (1 / ratio + 1)), "the paper's formula"


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_equal_stages_take_them_in_no_more_time(ratio):
    for stages in range(2, 9):
        times = [StageTimes(1, 0, ratio)] * stages
        for micro_batches in (1, stages, 2 * stages + 1):
            plain = simulate(one_forward_one_backward(stages, micro_batches), times)
            warmup, cooldown = warmup_extras(stages, ratio), cooldown_extras(stages, ratio)
            for early, late in ((warmup, ()), ((), cooldown), (warmup, cooldown)):
                filled = simulate(
                    one_forward_one_backward(stages, micro_batches, warmup=early, cooldown=late), times
                )  # fmt: skip
                assert filled.seconds == plain.seconds
                assert (filled.bubble_share < plain.bubble_share) == bool(sum(early) + sum(late))


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_one_more_does_not_fit(ratio):
    for stages in range(2, 8):
        times = [StageTimes(1, 0, ratio)] * stages
        micro_batches = 2 * stages
        plain = simulate(one_forward_one_backward(stages, micro_batches), times).seconds
        warmup, cooldown = list(warmup_extras(stages, ratio)), list(cooldown_extras(stages, ratio))
        warmup[0] += 1
        cooldown[-1] += 1
        for early, late in ((warmup, ()), ((), cooldown)):
            schedule = one_forward_one_backward(stages, micro_batches, warmup=early, cooldown=late)
            assert simulate(schedule, times).seconds > plain


def test_activations_held_of_extra_ones():
    schedule = one_forward_one_backward(4, 6, warmup=(2, 1, 0, 0), cooldown=(0, 0, 1, 2))
    assert simulate(schedule, [StageTimes(1, 0, 2)] * 4).in_flight == (4 + 2, 3 + 1, 2, 1)


def test_counts_and_divisors():
    warmup, cooldown, terms = (2, 1, 0, 0), (0, 0, 1, 2), (0, 1, 3)
    assert term_counts(6, warmup, cooldown, terms) == ((8, 7, 6), (0, 7, 6), (0, 0, 7), (0, 0, 8))
    assert term_divisors("unbiased", 6, warmup, cooldown, terms) == term_counts(6, warmup, cooldown, terms)
    assert term_divisors("eellm_code", 6, warmup, cooldown, terms) == ((8, 8, 8), (0, 8, 8), (0, 0, 8), (0, 0, 8))
    with pytest.raises(ConfigError, match=r"bubble_norm='mean' is not known. HINT: One of: unbiased, eellm_code."):
        term_divisors("mean", 6, warmup, cooldown, terms)


def test_three_or_three_and_a_half():
    """M=4, K=2 in the warm-up; an exit term of 1 and a final term of 2 make 3, the released code's divisor 3.5."""
    warmup, cooldown, terms, values = (2, 0), (0, 0), (0, 1), (1.0, 2.0)
    counts = term_counts(4, warmup, cooldown, terms)
    totals = {
        norm: [
            sum(n * value / divisor for n, value, divisor in zip(row, values, divided, strict=True) if n)
            for row, divided in zip(counts, term_divisors(norm, 4, warmup, cooldown, terms), strict=True)
        ]
        for norm in ("unbiased", "eellm_code")
    }
    assert totals == {"unbiased": [3.0, 2.0], "eellm_code": [3.5, 2.0]}


WEIGHTS = (1.3, 0.7, -0.4, 0.9)
SHARES = {0: 0.5, 1: 0.25, 3: 1.0}
"""Stage of each loss term -> its weight; the last one is the full depth."""


def gradients(sample: float) -> dict[tuple[int, int], float]:
    """A chain of linear stages ``x_i = w_i x_{i-1}`` with losses ``share * x_j^2 / 2``: d loss_j / d w_i, i <= j."""
    states = [sample]
    for weight in WEIGHTS:
        states.append(weight * states[-1])
    found = {}
    for stage in range(len(WEIGHTS)):
        for term, share in SHARES.items():
            if term >= stage:
                through = 1.0
                for weight in WEIGHTS[stage + 1 : term + 1]:
                    through *= weight
                found[stage, term] = share * states[term + 1] * through * states[stage]
    return found


def estimate(norm: str, samples: dict[int, float], warmup: tuple[int, ...], cooldown: tuple[int, ...]) -> list[float]:
    """Each stage's gradient from a sample a micro-batch; what runs where is read off the schedule, not the counts."""
    micro_batches = len(samples) - max(warmup) - max(cooldown)
    schedule = one_forward_one_backward(4, micro_batches, warmup=warmup, cooldown=cooldown)
    ran = [{i.micro_batch for i in stage if i.action == "backward"} for stage in schedule.stages]
    divisors = term_divisors(norm, micro_batches, warmup, cooldown, tuple(SHARES))
    found = [0.0] * 4
    for number, sample in samples.items():
        own = gradients(sample)
        for stage, (place, term) in product(range(4), enumerate(SHARES)):
            if term >= stage and all(number in ran[other] for other in range(stage, term + 1)):
                found[stage] += own[stage, term] / divisors[stage][place]
    return found


def plain(samples: list[float]) -> list[float]:
    """The mean gradient of regular micro-batches."""
    rows = [gradients(sample) for sample in samples]
    return [
        sum(row[own] / len(samples) for row in rows for own in row if own[0] == stage) for stage in range(len(WEIGHTS))
    ]


@pytest.mark.parametrize(
    ("warmup", "cooldown"),
    [((2, 2, 0, 0), (0,) * 4), ((2, 0, 0, 0), (0,) * 4), ((0,) * 4, (0, 0, 2, 2)), ((2, 2, 0, 0), (0, 0, 0, 2))],
)
def test_copies_of_the_regular_micro_batches_change_nothing(warmup, cooldown):
    regular = [0.7, -1.9]
    extra = {-1: 0.7, -2: -1.9} if max(warmup) else {}
    late = {2: 0.7, 3: -1.9} if max(cooldown) else {}
    samples = {0: 0.7, 1: -1.9, **extra, **late}
    assert estimate("unbiased", samples, warmup, cooldown) == pytest.approx(plain(regular), rel=1e-12)
    assert estimate("eellm_code", samples, warmup, cooldown) != pytest.approx(plain(regular), rel=1e-2)


def drawn(generator: random.Random) -> dict[int, float]:
    """4 regular micro-batches, 2 extra ones of the warm-up, 2 of the cool-down."""
    return {number: generator.gauss(0.0, 1.0) for number in range(-2, 6)}


def test_over_random_draws_the_mean_is_the_full_gradient():
    generator = random.Random(5)
    draws = 2000
    rows = [estimate("unbiased", drawn(generator), (2, 1, 0, 0), (0, 0, 1, 2)) for _ in range(draws)]
    truth = plain([1.0])  # gradients are quadratic in a standard normal sample
    for stage, column in enumerate(zip(*rows, strict=True)):
        error = statistics.stdev(column) / draws**0.5
        assert abs(statistics.fmean(column) - truth[stage]) < 4 * error
        assert abs(truth[stage]) > 12 * error, "an estimate a third off would be told apart"


def test_the_released_codes_divisor_is_off_by_the_share_it_says():
    generator = random.Random(6)
    for _ in range(20):
        samples = drawn(generator)
        unbiased, theirs = (estimate(norm, samples, (2, 1, 0, 0), (0, 0, 1, 2)) for norm in ("unbiased", "eellm_code"))
        # Stage 2 sees one term from 5 of 4 + 2 micro-batches, stage 3 from all 6.
        assert theirs[2] / unbiased[2] == pytest.approx(5 / 6, rel=1e-12)
        assert theirs[3] == pytest.approx(unbiased[3], rel=1e-12)
