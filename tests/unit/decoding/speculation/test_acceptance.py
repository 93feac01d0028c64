"""The acceptance rules: greedy ones by hand, sampled ones by chi-square against the distribution they must keep."""

from __future__ import annotations

import pytest
import torch

from eetrain.decoding.speculation.acceptance import draw, verify_greedily, verify_sampled
from eetrain.testing.statistics import chi_square_p

DRAWS = 40_000


def scores(*picks: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(picks), 5).float()


@pytest.mark.parametrize(
    ("picks", "drafts", "count", "accepted", "token"),
    [
        ((1, 2, 3), (1, 2), 2, 2, 3),
        ((1, 2, 3), (1, 4), 2, 1, 2),
        ((1, 2, 3), (0, 2), 2, 0, 1),  # the second agrees, but stands behind one that fell
        ((1, 2, 3), (1, 2), 1, 1, 2),  # the second is no draft of this row
        ((1, 2, 3), (1, 2), 0, 0, 1),
        ((4,), (), 0, 0, 4),
    ],
)
def test_greedy(picks, drafts, count, accepted, token):
    drafts_BK = torch.tensor([drafts], dtype=torch.int64)
    verdict = verify_greedily(scores(*picks)[None], drafts_BK, torch.tensor([count]))
    assert (int(verdict.accepted), int(verdict.tokens)) == (accepted, token)


def test_greedy_rows_of_unequal_length():
    picks = torch.stack([scores(1, 2, 3), scores(1, 2, 3), scores(0, 0, 0)])
    drafts = torch.tensor([[1, 2], [1, 2], [4, 4]])
    verdict = verify_greedily(picks, drafts, torch.tensor([2, 1, 2]))
    assert verdict.accepted.tolist() == [2, 1, 0]
    assert verdict.tokens.tolist() == [3, 2, 0]


def distributions(seed: int, *shape: int) -> torch.Tensor:
    weights = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights / weights.sum(-1, keepdim=True)


def first_two(p_3V: torch.Tensor, q_2V: torch.Tensor, count: int) -> torch.Tensor:
    """How often each pair of first and second token came out; the second from ``p`` where nothing was drafted."""
    torch.manual_seed(1)
    drafts = torch.stack([torch.multinomial(q, DRAWS, replacement=True) for q in q_2V], dim=1)
    p, q = p_3V.expand(DRAWS, -1, -1), q_2V.expand(DRAWS, -1, -1)
    verdict = verify_sampled(p, q, drafts, torch.full((DRAWS,), count))
    tokens = torch.cat([drafts, drafts[:, :1]], dim=1)
    tokens[torch.arange(DRAWS), verdict.accepted] = verdict.tokens
    later = draw(p[:, 1])
    second = torch.where(verdict.accepted >= 1, tokens[:, 1], later)
    return torch.bincount(tokens[:, 0] * p.shape[-1] + second, minlength=p.shape[-1] ** 2)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampled_tokens_are_distributed_as_the_full_depth_says(seed, count):
    p, q = distributions(seed, 3, 4), distributions(seed + 10, 2, 4)
    expected = (p[0][:, None] * p[1][None]).flatten()
    assert chi_square_p(first_two(p, q, count), expected * DRAWS) > 1e-3


def test_the_test_tells_a_wrong_rule():
    """Without the replacement's subtraction of q the same test fails."""
    p, q = distributions(0, 3, 4), distributions(10, 2, 4)
    torch.manual_seed(1)
    drafts = torch.multinomial(q[0], DRAWS, replacement=True)
    stands = torch.rand(DRAWS, dtype=torch.float64) * q[0][drafts] < p[0][drafts]
    wrong = torch.where(stands, drafts, torch.multinomial(p[0], DRAWS, replacement=True))
    assert chi_square_p(torch.bincount(wrong, minlength=4), p[0] * DRAWS) < 1e-9


def test_a_draft_from_the_same_distribution_always_stands():
    p = distributions(3, 3, 6).expand(500, -1, -1)
    drafts = torch.stack([draw(p[:, 0]), draw(p[:, 1])], dim=1)
    verdict = verify_sampled(p, p[:, :2], drafts, torch.full((500,), 2))
    assert verdict.accepted.unique().tolist() == [2]


def test_drafts_that_the_full_depth_excludes_never_stand():
    p = torch.tensor([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]]).expand(200, -1, -1)
    q = torch.tensor([[[1.0, 0.0, 0.0]]]).expand(200, -1, -1)
    verdict = verify_sampled(p, q, torch.zeros(200, 1, dtype=torch.int64), torch.ones(200, dtype=torch.int64))
    assert verdict.accepted.unique().tolist() == [0]
    assert set(verdict.tokens.tolist()) == {1, 2}
