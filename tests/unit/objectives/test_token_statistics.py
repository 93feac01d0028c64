"""Statistics of one row of logits against softmax, topk and the definition of entropy."""

from __future__ import annotations

import pytest
import torch

from eetrain.backbones.projection import Projection
from eetrain.objectives.linear_ce import linear_cross_entropy
from eetrain.objectives.token_statistics import exponentiate_


def logits_and_labels(rows=9, vocabulary=7):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("level", ["none", "basic", "all"])
def test_every_statistic_follows_its_definition(level):
    logits, labels = logits_and_labels()
    probs = logits.softmax(-1)
    nll, total, statistics = exponentiate_(logits.clone(), labels, level)
    top = probs.topk(2).values
    torch.testing.assert_close(nll, -probs[torch.arange(9), labels].log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total[:, 0], 1 / top[:, 0], rtol=1e-12, atol=1e-12)
    if level == "none":
        assert statistics is None
        return
    assert torch.equal(statistics.prediction, logits.argmax(-1))
    torch.testing.assert_close(statistics.max_prob, top[:, 0], rtol=1e-12, atol=1e-12)
    if level == "basic":
        assert statistics.margin is None
        assert statistics.entropy is None
        assert statistics.sharp_entropy is None
        return
    torch.testing.assert_close(statistics.margin, top[:, 0] - top[:, 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.entropy, -(probs * probs.log()).sum(-1), rtol=1e-12, atol=1e-12)
    sharp = probs.square() / probs.square().sum(-1, keepdim=True)
    torch.testing.assert_close(statistics.sharp_entropy, -(sharp * sharp.log()).sum(-1), rtol=1e-12, atol=1e-12)


def test_the_buffer_ends_as_exponentials_whatever_was_measured():
    logits, labels = logits_and_labels()
    wanted = (logits - logits.amax(-1, keepdim=True)).exp()
    for level in ("none", "basic", "all"):
        buffer = logits.clone()
        exponentiate_(buffer, labels, level)
        assert torch.equal(buffer, wanted)


def test_closed_forms():
    uniform = torch.zeros(1, 8, dtype=torch.float64)
    _, _, statistics = exponentiate_(uniform, torch.tensor([3]), "all")
    assert statistics.margin.item() == 0.0
    assert statistics.max_prob.item() == 0.125
    assert statistics.entropy.item() == pytest.approx(3 * torch.tensor(2.0).log().item(), abs=1e-7)
    assert statistics.sharp_entropy.item() == pytest.approx(3 * torch.tensor(2.0).log().item(), abs=1e-7)
    certain = torch.tensor([[1000.0, 0.0, -1000.0]])
    nll, _, statistics = exponentiate_(certain, torch.tensor([1]), "all")
    assert nll.item() == 1000.0
    names = ("max_prob", "margin", "entropy", "sharp_entropy")
    assert [getattr(statistics, name).item() for name in names] == [1.0, 1.0, 0.0, 0.0]


def test_forbidden_tokens_leave_the_entropy_finite():
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    _, _, statistics = exponentiate_(logits, torch.tensor([0]), "all")
    assert statistics.entropy.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert statistics.sharp_entropy.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_ignored_positions_are_blank_and_the_others_in_place():
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    head = Projection(torch.randn(5, 4, generator=generator))
    labels = torch.tensor([1, -100, 2, 3, -100, 0])
    out = linear_cross_entropy(
        hidden, [head, head], labels, exit_weights=[1, 1], statistics="all", chunk_size=3
    ).statistics
    valid = labels != -100
    for row, states in enumerate(hidden):
        _, _, wanted = exponentiate_(head(states[valid]), labels[valid], "all")
        for name in ("nll", "prediction", "max_prob", "margin", "entropy", "sharp_entropy"):
            torch.testing.assert_close(getattr(out, name)[row, valid], getattr(wanted, name))
        assert out.prediction[row, ~valid].tolist() == [-100, -100]
        for name in ("nll", "max_prob", "margin", "entropy", "sharp_entropy"):
            assert getattr(out, name)[row, ~valid].tolist() == [0.0, 0.0]


def test_a_function_of_the_statistics_sees_what_the_level_promises():
    hidden, head = [torch.randn(4, 3)], Projection(torch.randn(5, 3))
    seen = []

    def weigh(statistics, exit_index, rows):
        seen.append((statistics.max_prob.shape, statistics.margin is not None))
        return statistics.max_prob

    for level, has_margin in (("none", False), ("basic", False), ("all", True)):
        seen.clear()
        out = linear_cross_entropy(
            hidden,
            [head],
            torch.arange(4),
            exit_weights=[1.0],
            token_weights=weigh,
            statistics=level,
            chunk_size=3,
        )
        assert seen == [((3,), has_margin), ((1,), has_margin)]
        assert (out.statistics is None) == (level == "none")


def test_a_function_is_called_for_the_exits_of_a_chunk_in_order_with_its_positions():
    hidden = [torch.randn(5, 3) for _ in range(3)]
    head, labels = Projection(torch.randn(4, 3)), torch.tensor([0, -100, 1, 2, 3])
    seen = []

    def weigh(statistics, exit_index, rows):
        seen.append((exit_index, rows.tolist()))
        return statistics.max_prob

    linear_cross_entropy(hidden, [head] * 3, labels, exit_weights=[1, 1, 1], token_weights=weigh, chunk_size=3)
    assert seen == [(0, [0, 2, 3]), (1, [0, 2, 3]), (2, [0, 2, 3]), (0, [4]), (1, [4]), (2, [4])]
