"""The chunked multi-exit loss against plain autograd, transformers' own loss and finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from eetrain.backbones.projection import Projection
from eetrain.errors import ConfigError
from eetrain.objectives.linear_ce import linear_cross_entropy, shift_labels

N, D, V = 11, 5, 13


def make(num_exits, *, tied=True, bias=False, scale=1.0, softcap=None, ignored=(), dtype=torch.float64, seed=0):
    """Leaf hidden states, projections and labels."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden = [leaf(N, D) for _ in range(num_exits)]
    heads = []
    for index in range(num_exits):
        if tied and index:
            heads.append(heads[0])
        else:
            heads.append(Projection(leaf(V, D), leaf(V) if bias else None, scale, softcap))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[list(ignored)] = -100
    return hidden, heads, labels


def leaves(hidden, heads):
    unique = {id(t): t for h in heads for t in (h.weight, h.bias) if t is not None}
    return [*hidden, *unique.values()]


def reference(hidden, heads, labels, weights, weigh=None, normalizer=None):
    """All logits at once, loss by F.cross_entropy, gradients by autograd."""
    valid = labels != -100
    total = 0
    for states, head, weight in zip(hidden, heads, weights, strict=True):
        logits = head(states)
        nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        factor = weigh(logits.softmax(-1).max(-1).values).detach() if weigh else torch.ones_like(nll)
        total = total + weight * (nll * factor)[valid].sum()
    return total / (valid.sum().clamp(min=1) if normalizer is None else normalizer)


IGNORED = ((), (0, 3, 10), tuple(range(1, N)))
CASES = [
    (e, *rest)
    for e in (1, 2, 3, 4)
    for rest in itertools.product((True, False), (True, False), (1.0, 0.3), (None, 2.0), (False, True), IGNORED)
]


def test_every_combination_equals_autograd():
    assert len(CASES) == 4 * 2 * 2 * 2 * 2 * 2 * 3
    for num_exits, tied, bias, scale, softcap, weighted, ignored in CASES:
        hidden, heads, labels = make(num_exits, tied=tied, bias=bias, scale=scale, softcap=softcap, ignored=ignored)
        weights = [0.7, 0.0, 1.3, 0.1][:num_exits]
        wanted = reference(hidden, heads, labels, weights, (lambda p: p**2) if weighted else None)
        inputs = leaves(hidden, heads)
        wanted_grads = torch.autograd.grad(wanted, inputs)
        out = linear_cross_entropy(
            hidden,
            heads,
            labels,
            exit_weights=weights,
            token_weights=(lambda s, exit_index, rows: s.max_prob**2) if weighted else None,
            chunk_size=4,
        )
        grads = torch.autograd.grad(out.loss, inputs)
        case = (num_exits, tied, bias, scale, softcap, weighted, ignored)
        torch.testing.assert_close(out.loss, wanted, rtol=1e-12, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
        for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")


def test_reported_losses_are_plain_means_whatever_the_weights():
    hidden, heads, labels = make(3, tied=False, ignored=(2, 5))
    out = linear_cross_entropy(
        hidden, heads, labels, exit_weights=[0.5, 0.0, 9.0], token_weights=torch.rand(3, N), normalizer=3.0
    )
    plain = [F.cross_entropy(head(h), labels) for h, head in zip(hidden, heads, strict=True)]
    torch.testing.assert_close(out.exit_losses, torch.stack(plain), rtol=1e-12, atol=1e-12)
    assert not out.exit_losses.requires_grad
    assert out.num_tokens.item() == N - 2


@pytest.mark.parametrize("shape", [(3, N), (1, N), (N,)])
def test_token_weights_as_a_tensor_and_a_normalizer(shape):
    hidden, heads, labels = make(3, ignored=(4,))
    token_weights = torch.rand(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = linear_cross_entropy(
        hidden,
        heads,
        labels,
        exit_weights=torch.tensor([1.0, 2.0, 3.0]),
        token_weights=token_weights,
        normalizer=torch.tensor(7),
        chunk_size=3,
    )
    expanded = token_weights.detach().expand(3, N).double()
    nll = [F.cross_entropy(heads[0](h), labels, reduction="none", ignore_index=-100) for h in hidden]
    wanted = sum((e + 1) * (nll[e] * expanded[e]).sum() for e in range(3)) / 7
    torch.testing.assert_close(out.loss, wanted, rtol=1e-12, atol=1e-12)
    wanted_grads = torch.autograd.grad(wanted, leaves(hidden, heads))
    grads = torch.autograd.grad(out.loss, leaves(hidden, heads))
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-12)
    assert token_weights.grad is None


@pytest.mark.parametrize("ignored", [(), (1, 6, 7)])
def test_chunk_size_changes_nothing(ignored):
    results = []
    for chunk in (1, 2, 3, 5, N, 64, None):
        hidden, heads, labels = make(3, tied=False, softcap=3.0, bias=True, ignored=ignored)
        out = linear_cross_entropy(hidden, heads, labels, exit_weights=[1, 2, 3], statistics="all", chunk_size=chunk)
        out.loss.backward()
        stats = out.statistics
        results.append(
            [out.loss, stats.nll, stats.prediction, stats.max_prob, stats.margin, stats.entropy]
            + [t.grad for t in leaves(hidden, heads)]
        )
    for other in results[1:]:
        for value, first in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, first, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences():
    hidden, heads, labels = make(2, bias=True, scale=0.7, softcap=1.5, ignored=(0,))
    token_weights = torch.rand(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss():
        return linear_cross_entropy(
            hidden, heads, labels, exit_weights=[0.4, 1.1], token_weights=token_weights, chunk_size=4
        ).loss

    loss().backward()
    step = 1e-6
    for leaf in leaves(hidden, heads):
        flat = leaf.detach().view(-1)
        numeric = torch.empty_like(flat)
        for i in range(len(flat)):
            value = flat[i].item()
            with torch.no_grad():
                flat[i] = value + step
                above = loss()
                flat[i] = value - step
                below = loss()
                flat[i] = value
            numeric[i] = (above - below) / (2 * step)
        torch.testing.assert_close(leaf.grad.view(-1), numeric, rtol=1e-6, atol=1e-8)


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def test_loss_and_gradients_equal_transformers():
    model = tiny_llama()
    ids = torch.randint(0, 37, (3, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2, 6:] = -100
    for num_items in (None, 50):
        model.zero_grad()
        wanted = model(input_ids=ids, labels=labels, num_items_in_batch=num_items).loss
        wanted.backward()
        wanted_grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        states = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
        out = linear_cross_entropy(
            [states],
            [Projection(model.lm_head.weight)],
            shift_labels(labels),
            exit_weights=[1.0],
            normalizer=num_items,
            chunk_size=8,
        )
        out.loss.backward()
        torch.testing.assert_close(out.loss, wanted, rtol=1e-6, atol=1e-6)
        for parameter, wanted_grad in zip(model.parameters(), wanted_grads, strict=True):
            torch.testing.assert_close(parameter.grad, wanted_grad, rtol=1e-5, atol=1e-7)


def test_shift_pairs_each_position_with_the_next_label():
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert shift_labels(labels).tolist() == [2, 3, -100, -100, 6, -100]


def test_exits_sharing_a_matrix_get_the_sum_of_their_gradients():
    hidden, heads, labels = make(3)
    weight = heads[0].weight
    together = linear_cross_entropy(hidden, heads, labels, exit_weights=[0.2, 0.5, 1.0]).loss
    (joint,) = torch.autograd.grad(together, weight)
    apart = torch.zeros_like(joint)
    for states, factor in zip(hidden, (0.2, 0.5, 1.0), strict=True):
        loss = linear_cross_entropy([states], heads[:1], labels, exit_weights=[factor]).loss
        apart += torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(joint, apart, rtol=1e-12, atol=1e-12)


def test_one_tensor_as_the_hidden_states_of_two_exits():
    hidden, heads, labels = make(2, tied=False)
    both = [hidden[0], hidden[0]]
    loss = linear_cross_entropy(both, heads, labels, exit_weights=[1.0, 2.0]).loss
    wanted = reference(both, heads, labels, [1.0, 2.0])
    (grad,), (wanted_grad,) = torch.autograd.grad(loss, hidden[0]), torch.autograd.grad(wanted, hidden[0])
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-12)


def test_hidden_states_inside_a_graph_and_an_upstream_factor():
    hidden, heads, labels = make(2, ignored=(3,))
    mixer = torch.randn(D, D, dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy([h @ mixer for h in hidden], heads, labels, exit_weights=[1.0, 0.5]).loss
    wanted = reference([h @ mixer for h in hidden], heads, labels, [1.0, 0.5])
    inputs = [mixer, *leaves(hidden, heads)]
    for grad, wanted_grad in zip(
        torch.autograd.grad(-3 * loss, inputs), torch.autograd.grad(-3 * wanted, inputs), strict=True
    ):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-12)


def test_gradients_accumulate_over_micro_batches():
    hidden, heads, labels = make(2)
    for part in (slice(0, 4), slice(4, N)):
        rows = [h[part] for h in hidden]
        out = linear_cross_entropy(rows, heads, labels[part], exit_weights=[1.0, 0.3], normalizer=float(N))
        out.loss.backward()
    wanted = torch.autograd.grad(reference(hidden, heads, labels, [1.0, 0.3]), leaves(hidden, heads))
    for leaf, wanted_grad in zip(leaves(hidden, heads), wanted, strict=True):
        torch.testing.assert_close(leaf.grad, wanted_grad, rtol=1e-12, atol=1e-12)


def test_nothing_to_learn_gives_zero_loss_and_zero_gradients():
    hidden, heads, labels = make(2, bias=True, ignored=range(N))
    out = linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0, 1.0], statistics="all")
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert out.exit_losses.tolist() == [0.0, 0.0]
    assert out.num_tokens.item() == 0
    for leaf in leaves(hidden, heads):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert torch.equal(out.statistics.prediction, torch.full((2, N), -100))


def test_an_exit_of_weight_zero_is_measured_but_not_trained():
    hidden, heads, labels = make(2, tied=False)
    with torch.no_grad():
        hidden[0].fill_(float("nan"))
    out = linear_cross_entropy(hidden, heads, labels, exit_weights=[0.0, 1.0])
    out.loss.backward()
    torch.testing.assert_close(out.loss, F.cross_entropy(heads[1](hidden[1]), labels), rtol=1e-12, atol=1e-12)
    assert out.exit_losses[0].isnan()
    assert hidden[0].grad.count_nonzero() == 0
    assert heads[0].weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient_and_do_not_disturb_the_rest(frozen):
    hidden, heads, labels = make(2, tied=False, bias=True)
    wanted = torch.autograd.grad(reference(hidden, heads, labels, [1.0, 1.0]), leaves(hidden, heads))
    still = hidden if frozen == "hidden" else [heads[0].weight, heads[1].weight]
    for leaf in still:
        leaf.requires_grad_(False)
    linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0, 1.0]).loss.backward()
    for leaf, wanted_grad in zip(leaves(hidden, heads), wanted, strict=True):
        if any(leaf is other for other in still):
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, wanted_grad, rtol=1e-12, atol=1e-12)


def test_without_gradients_the_values_stay_the_same():
    hidden, heads, labels = make(2, softcap=4.0)
    with_grad = linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0, 1.0], statistics="all")
    with torch.no_grad():
        without = linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0, 1.0], statistics="all")
    assert with_grad.loss.requires_grad
    assert not without.loss.requires_grad
    assert torch.equal(with_grad.loss.detach(), without.loss)
    assert torch.equal(with_grad.statistics.nll, without.statistics.nll)


def test_second_backward_and_second_derivative_say_why_they_fail():
    hidden, heads, labels = make(1)
    loss = linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0]).loss
    with pytest.raises(RuntimeError, match=r"no second derivative.*without create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward twice.*instead of using retain_graph"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sixteen_bit_parameters(dtype, softcap):
    hidden, heads, labels = make(3, bias=True, softcap=softcap, dtype=dtype, ignored=(2,))
    exact = [h.detach().float().requires_grad_() for h in hidden]
    shared = Projection(
        heads[0].weight.detach().float().requires_grad_(),
        heads[0].bias.detach().float().requires_grad_(),
        1.0,
        softcap,
    )
    wanted = reference(exact, [shared] * 3, labels, [1.0, 0.5, 0.2])
    wanted.backward()
    out = linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0, 0.5, 0.2], chunk_size=3)
    out.loss.backward()
    tolerance = 4 * torch.finfo(dtype).eps
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, wanted, rtol=tolerance, atol=tolerance)
    for leaf, other in zip(leaves(hidden, heads), leaves(exact, [shared]), strict=True):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.float() - other.grad).norm() / other.grad.norm()
        assert error < tolerance


def test_float16_gradients_survive_a_large_normalizer_with_a_loss_scale():
    hidden, heads, labels = make(1, dtype=torch.float16)
    exact = hidden[0].detach().float().requires_grad_()
    head = Projection(heads[0].weight.detach().float())
    scale, tokens = 2.0**16, 1e7
    (reference([exact], [head], labels, [1.0], normalizer=tokens) * scale).backward()
    (linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0], normalizer=tokens).loss * scale).backward()
    error = (hidden[0].grad.float() - exact.grad).norm() / exact.grad.norm()
    assert error < 4 * torch.finfo(torch.float16).eps


def test_sixteen_bit_matrices_accumulate_in_float32():
    """Sums of many small chunks stall in bfloat16; one token per chunk shows it."""
    tokens = 2048
    generator = torch.Generator().manual_seed(4)
    hidden = (torch.rand(tokens, D, generator=generator) + 0.5).bfloat16()
    weight = torch.randn(V, D, generator=generator).bfloat16().requires_grad_()
    labels = torch.zeros(tokens, dtype=torch.int64)
    exact = weight.detach().float().requires_grad_()
    F.cross_entropy(F.linear(hidden.float(), exact), labels).backward()
    linear_cross_entropy([hidden], [Projection(weight)], labels, exit_weights=[1.0], chunk_size=1).loss.backward()
    error = (weight.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_autocast_runs_products_in_bfloat16_and_the_rest_in_float32():
    hidden, heads, labels = make(2, dtype=torch.float32, bias=True, ignored=(1,))
    wanted_grads = torch.autograd.grad(reference(hidden, heads, labels, [1.0, 1.0]), leaves(hidden, heads))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = sum(F.cross_entropy(F.linear(h, heads[0].weight, heads[0].bias).float(), labels) for h in hidden)
        out = linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0, 1.0])
    out.loss.backward()
    torch.testing.assert_close(out.loss, plain, rtol=1e-6, atol=1e-6)
    for leaf, wanted_grad in zip(leaves(hidden, heads), wanted_grads, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - wanted_grad).norm() / wanted_grad.norm() < 4 * torch.finfo(torch.bfloat16).eps


def test_wrong_arguments_are_named():
    hidden, heads, labels = make(2)
    with pytest.raises(ConfigError, match="2 hidden states, 1 projections and 2 exit weights"):
        linear_cross_entropy(hidden, heads[:1], labels, exit_weights=[1.0, 1.0])
    with pytest.raises(ConfigError, match="0 hidden states, 0 projections and 0 exit weights"):
        linear_cross_entropy([], [], labels, exit_weights=[])
    with pytest.raises(ConfigError, match="chunk_size is 0"):
        linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0, 1.0], chunk_size=0)
    with pytest.raises(ConfigError, match="kernel is 'liger'"):
        linear_cross_entropy(hidden, heads, labels, exit_weights=[1.0, 1.0], kernel="liger")
