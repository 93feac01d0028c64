"""What gates learn: optimal exits, targets and their loss against closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from eetrain.errors import ConfigError
from eetrain.objectives.gate_targets import (
    class_balance,
    gate_loss,
    optimal_exit,
    parse_exit_costs,
    predicted_index,
    stop_targets,
)

COSTS = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)


def loss_of(logits, targets, *, balance):
    tokens = torch.tensor(float(len(targets)))
    return gate_loss(logits, targets, tokens, class_balance(targets.sum(0), tokens) if balance else None)


def every_loss():
    """All combinations of five losses at three depths, ``[3, 125]``."""
    return torch.tensor(list(itertools.product([0.0, 0.25, 0.5, 1.0, 4.0], repeat=3)), dtype=torch.float64).t()


def test_the_optimal_exit_minimises_loss_plus_weighted_cost():
    nll, weights = every_loss(), [0.0, 0.5, 2.0]
    optimal = optimal_exit(nll, COSTS, torch.tensor(weights, dtype=torch.float64))
    assert optimal.shape == (125, 3)
    for token, k in itertools.product(range(125), range(3)):
        totals = [nll[depth, token].item() + weights[k] * COSTS[depth].item() for depth in range(3)]
        assert optimal[token, k].item() == totals.index(min(totals)), "the shallowest of equals"


def test_a_huge_cost_weight_means_the_first_exit_and_none_the_smallest_loss():
    nll = every_loss()
    optimal = optimal_exit(nll, COSTS, torch.tensor([0.0, 1e9, float("inf")], dtype=torch.float64))
    assert torch.equal(optimal[:, 0], nll.argmin(0))
    assert (optimal[:, 1:] == 0).all()


def test_a_larger_cost_weight_never_goes_deeper():
    optimal = optimal_exit(every_loss(), COSTS, torch.linspace(0, 20, 41, dtype=torch.float64))
    assert (optimal.diff(dim=-1) <= 0).all()


def test_targets_are_steps_that_rise_at_the_optimal_exit():
    targets = stop_targets(torch.tensor([[0, 1], [2, 3]]), 3)
    assert targets.tolist() == [[[1, 1, 1], [0, 1, 1]], [[0, 0, 1], [0, 0, 0]]]
    assert (targets.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("balance", [True, False])
def test_the_loss_is_weighted_binary_cross_entropy(balance):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 2, 3, generator=generator, dtype=torch.float64)
    targets = (torch.rand(50, 2, 3, generator=generator) < torch.tensor([0.1, 0.5, 0.9])).double()
    wanted = 0.0
    for k, gate in itertools.product(range(2), range(3)):
        g, y = logits[:, k, gate].sigmoid(), targets[:, k, gate]
        positive = y.sum()
        weight = (50 - positive) / positive if balance else 1.0
        wanted += -(weight * y * g.log() + (1 - y) * (1 - g).log()).mean() / 6
    torch.testing.assert_close(loss_of(logits, targets, balance=balance), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_gate_with_one_class_is_trained_without_balance(target):
    logits = torch.randn(8, 1, 1, dtype=torch.float64)
    targets = torch.full_like(logits, target)
    wanted = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(loss_of(logits, targets, balance=True), wanted, rtol=1e-12, atol=0)


def test_no_token_is_no_loss_and_still_a_graph():
    logits = torch.zeros(0, 2, 3, requires_grad=True)
    loss = loss_of(logits, torch.zeros(0, 2, 3), balance=True)
    assert loss.item() == 0.0
    loss.backward()


def test_parts_of_a_batch_add_up_to_it():
    logits, targets = torch.randn(9, 2, 3, dtype=torch.float64), (torch.rand(9, 2, 3) > 0.4).double()
    tokens = torch.tensor(9.0)
    balance = class_balance(targets.sum(0), tokens)
    parts = [gate_loss(logits[rows], targets[rows], tokens, balance) for rows in (slice(0, 2), slice(2, 9))]
    torch.testing.assert_close(sum(parts), loss_of(logits, targets, balance=True), rtol=1e-12, atol=0)


def test_the_index_counts_from_every_gap_in_the_labels():
    labels = torch.tensor([-100, 5, 6, 7, -100, -100, 8, 9, -100])
    assert predicted_index(labels).tolist() == [-1, 0, 1, 2, -1, -1, 0, 1, -1]
    assert predicted_index(torch.tensor([5, 6, -100])).tolist() == [0, 1, -1]
    assert predicted_index(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_costs_are_shares_of_the_blocks_or_measured():
    assert parse_exit_costs("blocks", [3, 6, 9], 12) == (0.25, 0.5, 0.75, 1.0)
    assert parse_exit_costs({6: 0.6, 3: 0.35}, [3, 6], 12) == (0.35, 0.6, 1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("time", r"exit_costs is 'time'.*HINT: Use 'blocks', or a dict"),
        (
            {3: 0.3},
            r"exit_costs names layers \[3\]; the model's exits are at layers \[3, 6\].*relative latency of every",
        ),
        ({3: 0.3, 6: 0.5, 9: 0.8}, r"names layers \[3, 6, 9\]"),
        ({3: 0.5, 6: 0.5}, r"exit_costs is \{3: 0.5, 6: 0.5\}; costs must be above 0, rise with depth"),
        ({3: 0.0, 6: 0.5}, "must be above 0"),
        ({3: 0.5, 6: 1.1}, "end at 1 or below.*HINT: Divide each exit's latency"),
        ({3: float("nan"), 6: 0.5}, "rise with depth"),
    ],
)
def test_costs_that_do_not_fit_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_exit_costs(value, [3, 6], 12)
