"""A loss computed in backward gives the gradients of a loss computed in forward, and nothing of it lives in between."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eetrain.backbones.projection import Projection
from eetrain.objectives.linear_ce import linear_cross_entropy
from eetrain.parallel.injection import carry, end, hold, inject

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 5, 8, 97


class Net(nn.Module):
    """Two blocks with an exit of its own norm between them; exit and end share an output matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.matrix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.double()

    def exit_loss(self, hidden_BTD, labels_BT):
        """Through plain logits, which autograd would keep."""
        logits_BTV = self.matrix(self.norm(hidden_BTD))
        return 0.3 * F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())

    @property
    def of_exit(self):
        return [*self.norm.parameters(), self.matrix.weight]


def batch():
    draw = torch.Generator().manual_seed(1)
    values_BT3 = torch.randn(ROWS, LENGTH, 3, generator=draw, dtype=torch.float64)
    return values_BT3, torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=draw)


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters()}


def assert_close(found, wanted):
    assert {name for name, grad in found.items() if grad is not None} == {
        name for name, grad in wanted.items() if grad is not None
    }
    for name, grad in wanted.items():
        if grad is not None:
            torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-14, msg=name)


def eager(net, *, until_second=True):
    values_BT3, labels_BT = batch()
    hidden_BTD = net.first(net.embed(values_BT3))
    loss = net.exit_loss(hidden_BTD, labels_BT)
    if until_second:
        loss = loss + net.exit_loss(net.second(hidden_BTD), labels_BT)
    loss.backward()
    return gradients(net)


def test_gradients_are_those_of_a_loss_in_the_forward_pass():
    net, (values_BT3, labels_BT) = Net(), batch()
    seen = []

    def loss(hidden_BTD):
        seen.append(net.exit_loss(hidden_BTD, labels_BT))
        return seen[-1]

    hidden_BTD = inject(net.first(net.embed(values_BT3)), loss, net.of_exit, through=True)
    last_BTD = inject(net.second(hidden_BTD), loss, net.of_exit, through=True)
    assert not seen, "the loss waits for backward"
    end(last_BTD).backward()
    assert_close(gradients(net), eager(Net()))
    assert len(seen) == 2


def test_a_stage_adds_its_loss_to_the_gradient_it_gets_and_sends_the_sum_back():
    """Two stages, with nothing but the hidden state and its gradient between them."""
    net, (values_BT3, labels_BT) = Net(), batch()

    def loss(hidden_BTD):
        return net.exit_loss(hidden_BTD, labels_BT)

    sent_BTD = inject(net.first(net.embed(values_BT3)), loss, net.of_exit, through=True)
    received_BTD = sent_BTD.detach().requires_grad_()
    end(inject(net.second(received_BTD), loss, net.of_exit, through=True)).backward()
    sent_BTD.backward(received_BTD.grad)
    assert_close(gradients(net), eager(Net()))


def test_hidden_state_passes_unchanged_and_shares_its_memory():
    hidden_BTD = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    passed_BTD = inject(hidden_BTD, lambda hidden_BTD: hidden_BTD.sum(), [], through=True)
    assert torch.equal(passed_BTD, hidden_BTD)
    assert passed_BTD.data_ptr() == hidden_BTD.data_ptr()


def logits_alive():
    return [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, torch.Tensor) and thing.dim() and thing.shape[-1] == VOCABULARY and thing.dim() > 1
    ]


def saved_by(make):
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    net, kept = Net(), {}
    known = {p.untyped_storage()._cdata for p in net.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        result = make(net)
    assert result.requires_grad
    return sum(kept.values()), result


def test_between_forward_and_backward_there_are_no_logits_and_nothing_else_of_the_exit():
    values_BT3, labels_BT = batch()
    gc.collect()
    before = len(logits_alive())

    def with_exit(net):
        hidden_BTD = net.first(net.embed(values_BT3))
        hidden_BTD = inject(hidden_BTD, lambda h: net.exit_loss(h, labels_BT), net.of_exit, through=True)
        return net.second(hidden_BTD)

    kept, result = saved_by(with_exit)
    assert len(logits_alive()) == before
    assert kept == saved_by(lambda net: net.second(net.first(net.embed(values_BT3))))[0]
    result.sum().backward()
    assert len(logits_alive()) == before

    def in_forward(net):
        hidden_BTD = net.first(net.embed(values_BT3))
        return net.second(hidden_BTD).sum() + net.exit_loss(hidden_BTD, labels_BT)

    much, eager_result = saved_by(in_forward)
    assert eager_result.requires_grad
    assert len(logits_alive()) > before, "a loss in forward keeps logits, and both counts see them"
    assert much >= kept + ROWS * LENGTH * VOCABULARY * 8


def test_the_loss_that_is_used_gives_the_gradients_of_plain_logits():
    """The chunked cross-entropy as the loss, over several chunks, with its own stored gradients."""
    net, (values_BT3, labels_BT) = Net(), batch()

    def chunked(hidden_BTD):
        features_ND = net.norm(hidden_BTD).flatten(0, 1)
        projection, labels_N = Projection(net.matrix.weight), labels_BT.flatten()
        return linear_cross_entropy([features_ND], [projection], labels_N, exit_weights=[0.3], chunk_size=3).loss

    hidden_BTD = inject(net.first(net.embed(values_BT3)), chunked, net.of_exit, through=True)
    end(hidden_BTD).backward()
    assert_close(gradients(net), eager(Net(), until_second=False))


def frozen():
    net = Net()
    for part in (net.embed, net.first, net.second, net.matrix):
        part.requires_grad_(False)
    return net


def test_a_frozen_backbone_gets_no_gradient_and_is_not_differentiated_through():
    net, (values_BT3, labels_BT) = frozen(), batch()
    found = []

    def loss(hidden_BTD):
        assert not hidden_BTD.requires_grad, "the backbone in front would be differentiated through"
        found.append(1)
        return net.exit_loss(hidden_BTD, labels_BT)

    received_BTD = net.embed(values_BT3).requires_grad_()  # as the engine hands it to a stage
    with torch.no_grad():
        after_BTD = net.first(received_BTD)
    kept, last_BTD = saved_by(
        lambda _: inject(carry(received_BTD, after_BTD), loss, list(net.norm.parameters()), through=False)
    )
    assert kept == after_BTD.nbytes, "only where the exit looks"
    end(last_BTD).backward()
    assert found == [1]
    assert torch.equal(received_BTD.grad, torch.zeros_like(received_BTD)), "what is sent back says nothing"
    assert all(p.grad is None for name, p in net.named_parameters() if not name.startswith("norm."))

    truth = frozen()
    truth.exit_loss(after_BTD.detach(), labels_BT).backward()
    assert_close(gradients(net), gradients(truth))


@pytest.mark.parametrize("through", [True, False])
def test_through_decides_whether_a_hidden_state_with_a_history_gets_a_gradient(through):
    hidden_BTD = torch.zeros(ROWS, LENGTH, WIDTH, requires_grad=True)
    weight = nn.Parameter(torch.ones(()))
    end(inject(hidden_BTD, lambda h: (weight * (h + 2)).sum(), [weight], through=through)).backward()
    assert torch.equal(hidden_BTD.grad, torch.full_like(hidden_BTD, float(through)))
    assert weight.grad == 2 * ROWS * LENGTH * WIDTH


def test_what_nothing_learns_from_is_measured_without_autograd():
    hidden_BTD, seen = torch.ones(ROWS, LENGTH, WIDTH, requires_grad=True), []

    def loss(hidden_BTD):
        seen.append((hidden_BTD.sum(), torch.is_grad_enabled()))
        return seen[-1][0]

    passed_BTD = inject(hidden_BTD, loss, [], through=False)
    passed_BTD.backward(torch.full_like(hidden_BTD, 3.0))
    assert seen == [(ROWS * LENGTH * WIDTH, False)]
    assert torch.equal(hidden_BTD.grad, torch.full_like(hidden_BTD, 3.0))


def test_the_order_of_exits_on_one_hidden_state_does_not_matter():
    """Exit and full depth may look at one hidden state; a parameter of a loss may take no part in it."""
    hidden_BTD, idle = torch.full((1, 2, 3), 2.0, requires_grad=True), nn.Parameter(torch.ones(1))
    passed_BTD = inject(hidden_BTD, lambda h: h.square().sum(), [idle], through=True)
    end(inject(passed_BTD, lambda h: h.sum(), [], through=True)).backward()
    assert torch.equal(hidden_BTD.grad, torch.full((1, 2, 3), 5.0))
    assert idle.grad is None


def test_carry_hands_gradients_past_what_was_computed_without_autograd():
    before_BTD = torch.ones(1, 2, 3, requires_grad=True)
    with torch.no_grad():
        after_BTD = before_BTD * 7
    carried_BTD = carry(before_BTD, after_BTD)
    assert torch.equal(carried_BTD, after_BTD)
    carried_BTD.backward(torch.full((1, 2, 3), 4.0))
    assert torch.equal(before_BTD.grad, torch.full((1, 2, 3), 4.0))


def test_an_anchor_makes_a_graph_and_gets_zeros():
    hidden_BTD, anchor_1 = torch.ones(1, 2, 3), nn.Parameter(torch.ones(1))
    held_BTD = hold(hidden_BTD, anchor_1)
    assert torch.equal(held_BTD, hidden_BTD)
    assert held_BTD.requires_grad
    held_BTD.backward(torch.ones(1, 2, 3))
    assert torch.equal(anchor_1.grad, torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_end_is_a_loss_of_zero_that_sends_zeros(dtype):
    hidden_BTD = torch.ones(1, 2, 3, dtype=dtype, requires_grad=True)
    loss = end(hidden_BTD * 2)
    assert loss.shape == ()
    assert loss == 0
    (loss / 4).backward()
    assert hidden_BTD.grad.dtype == dtype
    assert torch.equal(hidden_BTD.grad, torch.zeros(1, 2, 3, dtype=dtype))
