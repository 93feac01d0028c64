"""Every measure against its formula in plain Python, and its range."""

from __future__ import annotations

import math

import pytest
import torch

from eetrain.decoding.confidence import MEASURES, Evidence

LOGITS = [[2.0, -1.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [30.0, -30.0, 0.0, 1.0]]
STATES = [[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]]
BEFORE = [[2.0, 1.0], [3.0, -1.0], [-0.5, -0.5]]


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def by_hand(name: str, row: int) -> float:
    p = sorted(softmax(LOGITS[row]), reverse=True)
    if name == "max":
        return p[0]
    if name == "margin":
        return p[0] - p[1]
    if name == "entropy":
        return 1 + sum(value * math.log(value) for value in p) / math.log(len(p))
    one, two = STATES[row], BEFORE[row]
    return sum(a * b for a, b in zip(one, two, strict=True)) / (math.hypot(*one) * math.hypot(*two))


@pytest.mark.parametrize("name", ["max", "margin", "entropy", "saturation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measures_equal_their_formulas(name, dtype):
    assert sorted(MEASURES) == ["entropy", "margin", "max", "saturation"]
    logits = torch.tensor(LOGITS, dtype=dtype)
    evidence = Evidence(2, torch.tensor(STATES, dtype=dtype), torch.tensor(BEFORE, dtype=dtype), lambda: logits)
    got = MEASURES[name](evidence).tolist()
    assert got == pytest.approx([by_hand(name, row) for row in range(3)], abs=1e-6)


def test_the_order_is_surer_is_more():
    flat, sharp = torch.zeros(1, 8), torch.tensor([[9.0] + [0.0] * 7])
    for name in ("max", "margin", "entropy"):
        low, high = (MEASURES[name](Evidence(1, flat, flat, lambda z=z: z)) for z in (flat, sharp))
        assert 0 <= low < high <= 1


def test_logits_are_computed_once_and_only_when_needed():
    calls = []

    def head():
        calls.append(1)
        return torch.zeros(1, 4)

    evidence = Evidence(1, torch.ones(1, 2), torch.ones(1, 2), head)
    MEASURES["saturation"](evidence)
    assert not calls
    MEASURES["max"](evidence)
    MEASURES["margin"](evidence)
    assert len(calls) == 1
