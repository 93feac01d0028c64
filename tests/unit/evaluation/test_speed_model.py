import random

import pytest

from eetrain.evaluation.speed_model import (
    RoundCosts,
    best_draft,
    block_evaluations,
    expected_speedup,
    judged_per_round,
    speedup,
    tokens_per_round,
)

COSTS = RoundCosts(early=3.0, head=0.5, verify=9.0, verify_more=1.0, full=12.5)


def simulated(acceptance: float, draft: int, rounds: int = 40_000) -> tuple[float, float, float]:
    """Tokens and judged drafts a round, and accepted by judged, of a decoder that draws each judgement."""
    draw = random.Random(0)
    tokens = judged = accepted = 0
    for _ in range(rounds):
        for _ in range(draft):
            judged += 1
            if draw.random() >= acceptance:
                break
            accepted += 1
        tokens += 1
    return (tokens + accepted) / rounds, judged / rounds, accepted / judged


@pytest.mark.parametrize("draft", [1, 2, 5, 12])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 0.97, 1.0])
def test_closed_forms_are_what_a_simulation_gives(acceptance: float, draft: int) -> None:
    tokens, judged, share = simulated(acceptance, draft)
    # 40,000 rounds of at most 13 tokens: a standard error below 0.025.
    assert tokens_per_round(acceptance, draft) == pytest.approx(tokens, abs=0.09)
    assert judged_per_round(acceptance, draft) == pytest.approx(judged, abs=0.09)
    assert share == pytest.approx(acceptance, abs=0.01), "accepted by judged estimates the acceptance"
    assert tokens_per_round(acceptance, draft) == pytest.approx(1 + acceptance * judged_per_round(acceptance, draft))


def test_near_certain_drafts_are_no_special_case() -> None:
    assert tokens_per_round(1.0, 7) == 8
    assert tokens_per_round(1 - 1e-9, 7) == pytest.approx(8, rel=1e-6)


def steps_of_a_round(draft: int) -> float:
    """Time of a round as a loop spends it."""
    clock, waiting = 0.0, 1
    for _ in range(draft):
        clock += COSTS.early + COSTS.head
        waiting += 1
    clock += COSTS.early  # the last draft is verified too, but nothing is drafted after it
    clock += COSTS.verify + COSTS.verify_more * (waiting - 1)
    return clock


@pytest.mark.parametrize("draft", [1, 4, 9])
def test_the_time_of_a_round(draft: int) -> None:
    assert COSTS.round(draft) == pytest.approx(steps_of_a_round(draft))
    tokens, *_ = simulated(0.8, draft)
    measured = 12.5 * tokens / steps_of_a_round(draft)
    assert expected_speedup(COSTS, 0.8, draft) == pytest.approx(measured, rel=0.02)
    assert speedup(COSTS, draft, 2.0) == 2 * 12.5 / steps_of_a_round(draft)


@pytest.mark.parametrize(("exit_layer", "num_blocks", "draft"), [(1, 2, 1), (3, 12, 4), (6, 12, 6)])
def test_blocks_of_a_round(exit_layer: int, num_blocks: int, draft: int) -> None:
    early = sum(exit_layer for _ in range(draft + 1))
    assert block_evaluations(exit_layer, num_blocks, draft) == early + (draft + 1) * (num_blocks - exit_layer)
    assert block_evaluations(exit_layer, num_blocks, draft) == num_blocks * (draft + 1)


def test_the_best_draft_grows_with_acceptance_and_shrinks_with_cost() -> None:
    lengths = [best_draft(COSTS, acceptance) for acceptance in (0.1, 0.5, 0.8, 0.95, 1.0)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (1, 32)
    # By hand: 1 draft yields 1.5 tokens in 16.5, 2 drafts 1.75 tokens in 21.
    assert lengths[1] == 1
    assert [expected_speedup(COSTS, 0.5, draft) for draft in (1, 2)] == [1.5 * 12.5 / 16.5, 1.75 * 12.5 / 21]
    cheap = RoundCosts(early=0.1, head=0.1, verify=9.0, verify_more=0.0, full=12.5)
    assert best_draft(cheap, 0.8) > best_draft(COSTS, 0.8)
    assert best_draft(COSTS, 1.0, (2, 1)) == 2
    flat = RoundCosts(early=1.0, head=0.0, verify=1.0, verify_more=0.0, full=1.0)
    assert best_draft(flat, 0.0, (3, 2, 1)) == 1


@pytest.mark.parametrize("acceptance", [-0.1, 1.1, float("nan")])
def test_refused_acceptance(acceptance: float) -> None:
    with pytest.raises(ValueError, match=r"acceptance=.*, must be between 0 and 1"):
        tokens_per_round(acceptance, 3)


def test_refused_sizes_and_times() -> None:
    with pytest.raises(ValueError, match=r"draft=0, must be at least 1"):
        judged_per_round(0.5, 0)
    with pytest.raises(ValueError, match=r"draft=0, must be at least 1"):
        COSTS.round(0)
    with pytest.raises(ValueError, match=r"early=0\.0, must be positive"):
        RoundCosts(0.0, 0.5, 9.0, 1.0, 12.5)
    with pytest.raises(ValueError, match=r"verify_more=-1\.0, must not be negative"):
        RoundCosts(3.0, 0.5, 9.0, -1.0, 12.5)
