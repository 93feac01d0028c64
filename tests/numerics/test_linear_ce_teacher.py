"""Distillation in the chunked loss against autograd on all logits at once, written down as the formula stands."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from eetrain.backbones.projection import Projection
from eetrain.objectives.linear_ce import linear_cross_entropy
from eetrain.objectives.teacher import Distillation, Teacher

N, D, V = 11, 5, 13


def leaf(draw, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()


def make(num_exits, *, tied=True, bias=False, scale=1.0, softcap=None, ignored=(), dtype=torch.float64):
    """Exits, then the full depth; tied: one matrix for all, else one each."""
    draw = torch.Generator().manual_seed(0)
    hidden = [leaf(draw, N, D, dtype=dtype) for _ in range(num_exits + 1)]
    heads = []
    for _ in hidden:
        fresh = Projection(leaf(draw, V, D, dtype=dtype), leaf(draw, V, dtype=dtype) if bias else None, scale, softcap)
        heads.append(heads[0] if tied and heads else fresh)
    labels = torch.randint(0, V, (N,), generator=draw)
    labels[list(ignored)] = -100
    return hidden, heads, labels


def leaves(hidden, heads):
    unique = {id(t): t for h in heads for t in (h.weight, h.bias) if t is not None}
    return [*hidden, *unique.values()]


def distribution(states, head, top_k):
    """The teacher's probabilities over the whole vocabulary."""
    probs = head(states).detach().softmax(-1)
    if top_k is not None:
        floor = probs.sort(-1, descending=True).values[:, top_k - 1 : top_k]
        probs = torch.where(probs >= floor, probs, 0)
    return probs / probs.sum(-1, keepdim=True)


def reference(hidden, heads, labels, weights, how, *, full_weight=None, token_weights=None):
    """Total, plain losses and divergences of the exits."""
    valid = labels != -100
    target = distribution(hidden[-1], heads[-1], how.top_k)
    total, plain, divergences = 0.0, [], []
    for place, weight in enumerate(weights):
        log_probs = heads[place](hidden[place]).log_softmax(-1)
        nll = F.nll_loss(log_probs, labels, ignore_index=-100, reduction="none")
        loss = (1 - how.share) * nll - how.share * (target * log_probs).sum(-1)
        factor = 1.0 if token_weights is None else token_weights[place]
        total = total + weight * (loss * factor)[valid].sum()
        plain.append(nll[valid].mean())
        divergences.append(F.kl_div(log_probs, target, reduction="none").sum(-1)[valid].mean())
    if full_weight is not None:
        nll = F.cross_entropy(heads[-1](hidden[-1]), labels, ignore_index=-100, reduction="none")
        factor = 1.0 if token_weights is None else token_weights[len(weights)]
        total = total + full_weight * (nll * factor)[valid].sum()
        plain.append(nll[valid].mean())
        divergences.append(nll.new_zeros(()))
    return total / valid.sum(), torch.stack(plain), torch.stack(divergences)


def chunked(hidden, heads, labels, weights, how, *, full_weight=None, place=None, **settings):
    """The same by the primitive; the full depth is a depth of the call if it has a weight, wherever it stands."""
    hidden, heads, weights = list(hidden), list(heads), list(weights)
    teacher_states, teacher_head = hidden.pop(), heads.pop()
    if full_weight is not None:
        place = len(weights) if place is None else place
        hidden.insert(place, teacher_states)
        heads.insert(place, teacher_head)
        weights.insert(place, full_weight)
    teacher = Teacher(teacher_states, teacher_head, how, place)
    return linear_cross_entropy(hidden, heads, labels, exit_weights=weights, teacher=teacher, **settings)


def assert_same(found, wanted, inputs, case):
    total, plain, divergences = wanted
    for ours, theirs in ((found.loss, total), (found.exit_losses, plain), (found.divergences, divergences)):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12, msg=lambda m: f"{case}: {m}")
    wanted_grads = torch.autograd.grad(total, inputs, allow_unused=True)
    grads = torch.autograd.grad(found.loss, inputs, allow_unused=True)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        assert (ours is None) == (theirs is None), case
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m: f"{case}: {m}")


CASES = list(
    itertools.product(
        (True, False), (True, False), (1.0, 0.3), (None, 2.0), ((), (0, 3, 10)), (1.0, 0.4), (None, 1, 4), (None, 0.9)
    )
)


def test_every_combination_equals_autograd():
    assert len(CASES) == 2 * 2 * 2 * 2 * 2 * 2 * 3 * 2
    token_weights = torch.rand(3, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for tied, bias, scale, softcap, ignored, share, top_k, full_weight in CASES:
        hidden, heads, labels = make(2, tied=tied, bias=bias, scale=scale, softcap=softcap, ignored=ignored)
        how, weights = Distillation(share, top_k), [0.7, 1.3]
        rows = token_weights if full_weight is not None else token_weights[:2]
        wanted = reference(hidden, heads, labels, weights, how, full_weight=full_weight, token_weights=rows)
        found = chunked(hidden, heads, labels, weights, how, full_weight=full_weight, token_weights=rows, chunk_size=4)
        case = (tied, bias, scale, softcap, ignored, share, top_k, full_weight)
        assert_same(found, (wanted[0], wanted[1].detach(), wanted[2].detach()), leaves(hidden, heads), case)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, N, 64, None])
@pytest.mark.parametrize("top_k", [None, 3])
def test_chunk_size_changes_nothing(chunk_size, top_k):
    hidden, heads, labels = make(2, bias=True, softcap=3.0, ignored=(1, 6))
    how = Distillation(0.6, top_k)
    wanted = reference(hidden, heads, labels, [1.0, 0.5], how, full_weight=1.0)
    found = chunked(hidden, heads, labels, [1.0, 0.5], how, full_weight=1.0, chunk_size=chunk_size)
    assert_same(found, wanted, leaves(hidden, heads), chunk_size)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_full_depth_may_stand_anywhere_among_the_depths(place, top_k):
    hidden, heads, labels = make(2)
    how = Distillation(0.6, top_k)
    total, plain, _ = reference(hidden, heads, labels, [1.0, 0.5], how, full_weight=2.0)
    found = chunked(hidden, heads, labels, [1.0, 0.5], how, full_weight=2.0, place=place)
    assert found.divergences[place] == 0
    torch.testing.assert_close(found.exit_losses[place], plain[-1], rtol=1e-12, atol=1e-12)
    grads = zip(*(torch.autograd.grad(loss, leaves(hidden, heads)) for loss in (found.loss, total)), strict=True)
    for ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences_with_the_teacher_held_still():
    hidden, heads, labels = make(2, bias=True, scale=0.7, softcap=1.5, ignored=(0,))
    still = hidden[-1].detach(), Projection(heads[0].weight.detach().clone(), heads[0].bias.detach().clone(), 0.7, 1.5)

    def loss():
        teacher = Teacher(*still, Distillation(0.7, 5))
        return linear_cross_entropy(
            hidden[:2], heads[:2], labels, exit_weights=[0.4, 1.1], teacher=teacher, chunk_size=4
        ).loss

    loss().backward()
    for tensor in (*hidden[:2], heads[0].weight, heads[0].bias):
        flat, step = tensor.detach().view(-1), 1e-6
        numeric = torch.empty_like(flat)
        for place, value in enumerate(flat.tolist()):
            with torch.no_grad():
                flat[place] = value + step
                above = loss()
                flat[place] = value - step
                below = loss()
                flat[place] = value
            numeric[place] = (above - below) / (2 * step)
        torch.testing.assert_close(tensor.grad.view(-1), numeric, rtol=1e-6, atol=1e-8)


def test_the_divergence_is_zero_where_the_exit_says_what_the_full_depth_says_and_only_there():
    hidden, heads, labels = make(2)
    copy = hidden[2].detach().clone().requires_grad_()
    found = linear_cross_entropy(
        [copy, hidden[1]],
        heads[:2],
        labels,
        exit_weights=[1.0, 1.0],
        teacher=Teacher(hidden[2], heads[2], Distillation()),
    )
    assert abs(float(found.divergences[0])) < 1e-14
    assert found.divergences[1] > 0.1
    grad, other = torch.autograd.grad(found.loss, [copy, hidden[1]])
    assert grad.abs().max() < 1e-15
    assert other.abs().max() > 1e-3


@pytest.mark.parametrize("top_k", [V, V + 5])
def test_keeping_as_many_tokens_as_there_are_is_keeping_all(top_k):
    hidden, heads, labels = make(2, bias=True, ignored=(2,))
    wanted = reference(hidden, heads, labels, [1.0, 0.5], Distillation(0.8), full_weight=1.0)
    found = chunked(hidden, heads, labels, [1.0, 0.5], Distillation(0.8, top_k), full_weight=1.0, chunk_size=3)
    assert_same(found, wanted, leaves(hidden, heads), top_k)


@pytest.mark.parametrize("full_weight", [None, 1.0])
def test_with_a_share_of_one_labels_say_only_which_positions_count(full_weight):
    hidden, heads, labels = make(2, tied=False, ignored=(2, 5))
    scrambled = torch.where(labels == -100, labels, (labels + 7) % V)
    grads = []
    for these in (labels, scrambled):
        found = chunked(hidden, heads, these, [1.0, 0.5], Distillation(), full_weight=full_weight, chunk_size=4)
        of_exits = [*hidden[:2], heads[0].weight, heads[1].weight]
        grads.append(torch.autograd.grad(found.loss, of_exits))
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))
    moved = labels.roll(1)
    found = chunked(hidden, heads, moved, [1.0, 0.5], Distillation(), full_weight=full_weight)
    assert not torch.equal(torch.autograd.grad(found.loss, hidden[0])[0], grads[0][0])


@pytest.mark.parametrize("full_weight", [None, 1.0])
def test_the_teacher_learns_nothing_from_the_exits(full_weight):
    hidden, heads, labels = make(2, tied=False)
    inputs = [hidden[2], heads[2].weight]
    found = chunked(hidden, heads, labels, [1.0, 0.5], Distillation(0.5), full_weight=full_weight)
    grads = torch.autograd.grad(found.loss, inputs, allow_unused=True)
    if full_weight is None:
        assert grads == (None, None)
        return
    wanted = torch.autograd.grad(F.cross_entropy(heads[2](hidden[2]), labels), inputs)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_token_weights_by_confidence_see_the_exits_in_their_order():
    hidden, heads, labels = make(2, ignored=(4,))
    seen = []

    def weigh(statistics, place, rows_C):
        seen.append(place)
        return statistics.max_prob * (place + 1)

    how = Distillation(0.5)
    found = chunked(hidden, heads, labels, [1.0, 0.5], how, full_weight=1.0, token_weights=weigh, chunk_size=N)
    rows = [heads[0](states).softmax(-1).amax(-1).detach() * (place + 1) for place, states in enumerate(hidden)]
    wanted = reference(hidden, heads, labels, [1.0, 0.5], how, full_weight=1.0, token_weights=rows)
    assert_same(found, wanted, leaves(hidden, heads), "confidence")
    assert seen == [0, 1, 2]


def test_an_exit_of_weight_zero_is_measured_but_not_trained():
    hidden, heads, labels = make(2, tied=False)
    wanted = reference(hidden, heads, labels, [0.0, 1.0], Distillation(0.5))
    found = chunked(hidden, heads, labels, [0.0, 1.0], Distillation(0.5))
    torch.testing.assert_close(found.divergences, wanted[2].detach(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(found.loss, hidden[0])[0].count_nonzero() == 0


def test_nothing_to_learn_gives_zeros():
    hidden, heads, labels = make(2, ignored=range(N))
    found = chunked(hidden, heads, labels, [1.0, 1.0], Distillation(), full_weight=1.0)
    found.loss.backward()
    assert found.loss == 0
    assert found.divergences.tolist() == [0.0, 0.0, 0.0]
    assert all(tensor.grad.count_nonzero() == 0 for tensor in leaves(hidden, heads))


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sixteen_bit_parameters(top_k, softcap):
    hidden, heads, labels = make(2, bias=True, softcap=softcap, dtype=torch.bfloat16, ignored=(2,))
    exact = [states.detach().float().requires_grad_() for states in hidden]
    shared = Projection(*(t.detach().float().requires_grad_() for t in (heads[0].weight, heads[0].bias)), 1.0, softcap)
    how = Distillation(0.7, top_k)
    total, _, divergences = reference(exact, [shared] * 3, labels, [1.0, 0.5], how, full_weight=1.0)
    found = chunked(hidden, heads, labels, [1.0, 0.5], how, full_weight=1.0, chunk_size=3)
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found.loss, total, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.divergences, divergences.detach(), rtol=tolerance, atol=tolerance)
    total.backward()
    found.loss.backward()
    for ours, theirs in zip(leaves(hidden, heads), leaves(exact, [shared]), strict=True):
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm() < tolerance


def test_a_large_common_offset_of_the_logits_costs_no_precision():
    """float32 holds 1000 + z to 6e-5 only if sums over the vocabulary do not multiply the error."""
    hidden, heads, labels = make(1, dtype=torch.float32)
    offset = Projection(heads[0].weight, torch.full((V,), 1000.0))
    plain = chunked(hidden, heads, labels, [1.0], Distillation())
    moved = chunked(hidden, [offset, offset], labels, [1.0], Distillation())
    torch.testing.assert_close(moved.divergences, plain.divergences, rtol=0, atol=2e-4)
