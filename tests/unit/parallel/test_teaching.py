"""The full depth's features reach the exits of all stages before these need them, whatever order backward takes."""

import pytest
import torch

from eetrain.parallel.injection import end, inject
from eetrain.parallel.layers import pack, unpack
from eetrain.parallel.stage import MicroBatch
from eetrain.parallel.teaching import carrier_like, relay, teach

SHAPE = (2, 3, 4)


def micro_batch():
    return MicroBatch(0, torch.zeros(2, 3, dtype=torch.long), torch.zeros(6, dtype=torch.long))


def exit_at(hidden_BTD, micro, seen):
    """An exit whose loss pulls the hidden state to the teacher."""

    def loss(hidden_BTD):
        seen.append(micro.teacher_BTD.clone())
        return (hidden_BTD - micro.teacher_BTD).square().sum() / 2

    return inject(hidden_BTD, loss, [], through=True)


def in_turn(outputs, grads):
    """As DeepSpeed 0.19 runs a stage backward."""
    for place, (output, grad) in enumerate(zip(outputs, grads, strict=True)):
        output.backward(gradient=grad, retain_graph=place < len(outputs) - 1)


def at_once(outputs, grads):
    torch.autograd.backward(outputs, grads)


@pytest.mark.parametrize("backward", [in_turn, at_once])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_three_stages_with_nothing_but_tensors_and_their_gradients_between_them(backward, dtype):
    torch.manual_seed(0)
    first_BTD = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    micros, seen = [micro_batch() for _ in range(3)], []
    sent, received, travelling = [], [], pack(first_BTD * 2, carrier_like(first_BTD))
    for stage, micro in enumerate(micros):
        hidden_BTD, carrier_BTD = unpack(travelling)
        hidden_BTD = exit_at(hidden_BTD * 3, micro, seen)
        if stage == 2:
            loss = end(teach(hidden_BTD, carrier_BTD, lambda last_BTD: last_BTD + 1, micro))
            break
        sent.append(pack(hidden_BTD, relay(carrier_BTD, micro)))
        assert sent[-1][1].grad_fn is not None
        received.append(tuple(tensor.detach().requires_grad_() for tensor in sent[-1]))
        travelling = received[-1]
    assert not seen
    loss.backward()
    for outputs, inputs in zip(reversed(sent), reversed(received), strict=True):
        assert all(tensor.grad is not None for tensor in inputs), "the engine sends every one of them"
        backward(outputs, [tensor.grad for tensor in inputs])
    x_BTD = first_BTD.detach().double().requires_grad_()
    teacher_BTD = 54 * x_BTD.detach() + 1
    sum((factor * x_BTD - teacher_BTD).square().sum() / 2 for factor in (6, 18, 54)).backward()
    assert [tensor.shape for tensor in seen] == [SHAPE] * 3
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    for tensor in seen:
        torch.testing.assert_close(tensor.double(), teacher_BTD, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first_BTD.grad.double(), x_BTD.grad, rtol=tolerance, atol=2 * tolerance * 54)


def test_features_are_taken_in_backward_without_autograd():
    hidden_BTD, micro, calls = torch.ones(SHAPE, requires_grad=True), micro_batch(), []

    def features(last_BTD):
        calls.append(torch.is_grad_enabled())
        return last_BTD * 5

    carrier_BTD = carrier_like(hidden_BTD)
    loss = end(teach(hidden_BTD, carrier_BTD, features, micro))
    assert not calls
    loss.backward()
    assert calls == [False]
    assert torch.equal(carrier_BTD.grad, torch.full(SHAPE, 5.0))
    assert torch.equal(hidden_BTD.grad, torch.zeros(SHAPE)), "the teacher learns nothing"


def test_a_carrier_travels_first_and_integers_last():
    hidden_BTD, bits = torch.ones(SHAPE), torch.ones(2, 3, dtype=torch.int32)
    carrier_BTD = carrier_like(hidden_BTD)
    assert not carrier_BTD.any()
    assert carrier_BTD.requires_grad
    assert pack(hidden_BTD, carrier_BTD) == (carrier_BTD, hidden_BTD)
    assert pack(hidden_BTD, bits) == (hidden_BTD, bits)
    assert pack(hidden_BTD, None) is hidden_BTD
    for beside in (carrier_BTD, bits, None):
        found = unpack(pack(hidden_BTD, beside))
        assert found[0] is hidden_BTD
        assert found[1] is beside
