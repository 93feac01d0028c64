"""The tuner on simulated exits: it must find the best one and its best length."""

from __future__ import annotations

import random

import pytest

from eetrain.decoding.speculation.tuning import DraftTuner, expected_tokens

# exit -> (share of drafts that stand, seconds a draft, seconds to verify)
EXITS = {1: (0.5, 1.0, 10.0), 2: (0.85, 1.6, 9.5), 3: (0.9, 4.0, 9.0)}


def simulate(rounds: int, exits=EXITS, longest: int = 8, seed: int = 0):
    tuner, dice, chosen = DraftTuner(longest), random.Random(seed), []
    for _ in range(rounds):
        layer, length = tuner.choose(list(exits))
        acceptance, draft, verify = exits[layer]
        accepted = 0
        while accepted < length and dice.random() < acceptance:
            accepted += 1
        tuner.observe(layer, length, (draft * length, verify), min(accepted + 1, length), accepted)
        chosen.append((layer, length))
    return chosen


def best(exits=EXITS, longest: int = 8) -> tuple[int, int]:
    def rate(layer: int, length: int) -> float:
        acceptance, draft, verify = exits[layer]
        return expected_tokens(acceptance, length) / (draft * length + verify)

    return max(((layer, length) for layer in exits for length in range(1, longest + 1)), key=lambda pair: rate(*pair))


def test_expected_tokens_is_the_mean_of_the_accepted_prefix():
    dice, total = random.Random(0), 0
    for _ in range(50_000):
        accepted = 0
        while accepted < 5 and dice.random() < 0.8:
            accepted += 1
        total += accepted + 1
    assert total / 50_000 == pytest.approx(expected_tokens(0.8, 5), abs=0.03)
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.0, 5) == 1


def test_every_exit_is_tried_then_the_best_is_kept():
    chosen = simulate(400)
    assert {layer for layer, _ in chosen[:9]} == set(EXITS)
    late = [layer for layer, _ in chosen[200:]]
    assert late.count(best()[0]) > 0.85 * len(late)
    lengths = [length for layer, length in chosen[200:] if layer == best()[0]]
    assert abs(sum(lengths) / len(lengths) - best()[1]) < 1.5


def test_it_follows_when_the_best_exit_changes():
    worse = EXITS | {2: (0.1, 1.6, 9.5)}
    tuner, dice, late = DraftTuner(8), random.Random(0), []
    for turn in range(900):
        exits = EXITS if turn < 200 else worse
        layer, length = tuner.choose(list(exits))
        acceptance, draft, verify = exits[layer]
        accepted = 0
        while accepted < length and dice.random() < acceptance:
            accepted += 1
        tuner.observe(layer, length, (draft * length, verify), min(accepted + 1, length), accepted)
        if turn >= 600:
            late.append(layer)
    assert late.count(2) < 0.2 * len(late)


def test_one_exit_gets_a_length_only():
    chosen = simulate(100, {2: EXITS[2]})
    assert {layer for layer, _ in chosen} == {2}
    assert all(1 <= length <= 8 for _, length in chosen)
