"""The cut-cross-entropy route: the package's reference on a CPU, its kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from eetrain.backbones.projection import Projection
from eetrain.objectives import cut_kernel
from eetrain.objectives.linear_ce import linear_cross_entropy


def inputs(device="cpu", dtype=torch.float32, width=16, vocabulary=97, tokens=24):
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_() for _ in "ab"]
    weight = torch.randn(vocabulary, width, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    labels[3:7] = -100
    return hidden, weight, labels


def gradients(loss, hidden, weight):
    return torch.autograd.grad(loss, [*hidden, weight])


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_reference_implementation_agrees(softcap):
    pytest.importorskip("cut_cross_entropy", reason="needs the extra eetrain[cce]")
    hidden, weight, labels = inputs()
    heads = [Projection(weight, softcap=softcap)] * 2
    token_weights = torch.rand(2, len(labels), generator=torch.Generator().manual_seed(1))
    ours = linear_cross_entropy(
        hidden, heads, labels, exit_weights=[0.5, 1.0], token_weights=token_weights, normalizer=1.0
    )
    loss, sums = cut_kernel.losses(hidden, heads, labels, [0.5, 1.0], token_weights, -100, impl="torch_compile")
    torch.testing.assert_close(loss, ours.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums / ours.num_tokens, ours.exit_losses, rtol=1e-5, atol=1e-5)
    for grad, own in zip(gradients(loss, hidden, weight), gradients(ours.loss, hidden, weight), strict=True):
        torch.testing.assert_close(grad, own, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_kernels_agree_on_a_gpu():
    pytest.importorskip("cut_cross_entropy", reason="needs the extra eetrain[cce]")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    hidden, weight, labels = inputs("cuda", torch.bfloat16, width=128, vocabulary=1024, tokens=512)
    heads = [Projection(weight)] * 2
    ours = linear_cross_entropy(hidden, heads, labels, exit_weights=[0.5, 1.0])
    cut = linear_cross_entropy(hidden, heads, labels, exit_weights=[0.5, 1.0], kernel="cce")
    torch.testing.assert_close(cut.loss, ours.loss, rtol=1e-2, atol=1e-2)
    for grad, own in zip(gradients(cut.loss, hidden, weight), gradients(ours.loss, hidden, weight), strict=True):
        assert (grad - own).float().norm() / own.float().norm() < 2e-2
