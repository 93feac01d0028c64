"""Rules that end a draft, against the statistics they promise."""

from __future__ import annotations

import gc
import random
import weakref

import pytest

from eetrain.decoding.speculation.policy import Speculative, memory_of
from eetrain.decoding.speculation.stopping import CalibratedStop, ConfidenceStop, FixedLength, ThompsonStop, build_stop
from eetrain.errors import ConfigError

CAP = 8


def drafted(rule, confidence: float = 0.5) -> int:
    length = 0
    while length < CAP and rule.keeps(confidence, length):
        length += 1
    return length


def oracle(rule, acceptance: float, rounds: int, seed: int = 1) -> list[int]:
    """Draft lengths while each draft stands with a known probability."""
    dice, lengths = random.Random(seed), []
    for _ in range(rounds):
        length = drafted(rule)
        accepted = 0
        while accepted < length and dice.random() < acceptance:
            accepted += 1
        rule.observe([0.5] * length, accepted)
        lengths.append(length)
    return lengths


def test_thompson_learns_the_acceptance():
    rule = ThompsonStop()
    oracle(rule, 0.7, 2000)
    assert rule.alpha / (rule.alpha + rule.beta) == pytest.approx(0.7, abs=0.02)


def test_thompson_with_drafts_that_always_stand_fills_the_draft():
    assert set(oracle(ThompsonStop(), 1.0, 400)[200:]) == {CAP}


def test_thompson_with_drafts_that_never_stand_drafts_one():
    lengths = oracle(ThompsonStop(), 0.0, 2000)[1000:]
    assert sum(lengths) / len(lengths) == pytest.approx(1.0, abs=0.01)
    assert min(lengths) == 1


def test_thompson_counts_drafts_behind_a_fallen_one_as_not_judged():
    rule = ThompsonStop()
    rule.observe([0.5] * 6, accepted=2)
    assert (rule.alpha, rule.beta) == (3.0, 2.0)
    rule.observe([0.5] * 3, accepted=3)
    assert (rule.alpha, rule.beta) == (6.0, 2.0)


def test_a_row_s_length_is_geometric_with_the_posterior_mean():
    """theta is drawn anew for each token, so it goes on with the posterior's mean."""
    rule = ThompsonStop()
    rule.alpha, rule.beta = 3.0, 2.0
    kept = sum(rule.keeps(0.5, 1) for _ in range(20_000)) / 20_000
    assert kept == pytest.approx(0.6, abs=0.015)


def test_confidence_keeps_what_is_surer():
    rule = ConfidenceStop(0.4)
    assert [rule.keeps(value, 0) for value in (0.39, 0.4, 0.41)] == [False, False, True]


def test_calibration_follows_what_verification_shows():
    rule = CalibratedStop()
    before = sum(rule.keeps(0.95, 0) for _ in range(4000)) / 4000
    assert before == pytest.approx(0.95, abs=0.015)
    for _ in range(400):  # exits that are sure and wrong half of the time
        rule.observe([0.95], accepted=0)
        rule.observe([0.95], accepted=1)
    after = sum(rule.keeps(0.95, 0) for _ in range(4000)) / 4000
    assert after == pytest.approx(0.5, abs=0.03)
    assert sum(rule.keeps(0.15, 0) for _ in range(4000)) / 4000 == pytest.approx(0.15, abs=0.02), "others learn nothing"


def test_calibration_counts_what_was_judged():
    rule = CalibratedStop()
    rule.observe([0.95, 0.55, 0.25], accepted=1)
    assert (sum(rule.stood), sum(rule.fell)) == (1, 1)
    assert (rule.stood[9], rule.fell[5]) == (1, 1)


def test_what_settings_stand_for():
    kinds = {None: FixedLength, 0.4: ConfidenceStop, "thompson": ThompsonStop, "calibrated": CalibratedStop}
    for setting, kind in kinds.items():
        assert type(build_stop(setting)) is kind
    assert drafted(FixedLength(), 0.0) == CAP


@pytest.mark.parametrize("stop", [-0.1, 1.5, "sometimes", float("nan")])
def test_bad_rules(stop):
    with pytest.raises(ConfigError, match=f"stop={stop} is no rule for ending a draft") as caught:
        Speculative((3,), stop=stop)
    assert "thompson, calibrated" in caught.value.hint


class Model:
    """Anything that can be forgotten."""


def test_what_was_learned_is_kept_by_model_and_policy():
    one, other = Model(), Model()
    memory = memory_of(one, Speculative((3,), stop="thompson"))
    assert memory_of(one, Speculative((3,), stop="thompson")) is memory
    assert memory_of(one, Speculative((2,), stop="thompson")) is not memory
    assert memory_of(other, Speculative((3,), stop="thompson")) is not memory
    gone = weakref.ref(memory)
    del one, memory
    gc.collect()
    assert gone() is None
