"""The auxiliary loss of mixtures of experts equals the model's own, with gradients, padding and checkpointing."""

from __future__ import annotations

import pytest
import torch

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones.routers import has_routers
from eetrain.errors import ConfigError
from eetrain.testing.tiny import tiny_model

MOE = ("mixtral", "qwen3_moe")


def data():
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def own_loss(model, ids, mask):
    output = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    return model.config.router_aux_loss_coef * output.aux_loss


def gradients(loss, module):
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_loss_and_gradients_equal_the_models_own(family, padded, checkpointing):
    backbone = tiny_model(family, router_aux_loss_coef=0.3)
    model = MultiExitModel(backbone, ExitConfig(layers=[2]))
    ids, mask = data()
    mask = mask if padded else None
    want = own_loss(backbone, ids, mask)
    want_gradients = gradients(want, backbone)
    assert len(want_gradients) > 4
    if checkpointing:
        backbone.gradient_checkpointing_enable()
        model.train()
    output = model(ids, mask, routers=True)
    torch.testing.assert_close(output.router_loss, want, rtol=0, atol=1e-12)
    got = gradients(output.router_loss, backbone)
    assert set(got) == set(want_gradients)
    for name in got:
        torch.testing.assert_close(got[name], want_gradients[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", MOE)
def test_padding_counts(family):
    backbone = tiny_model(family)
    ids, mask = data()
    assert not torch.isclose(own_loss(backbone, ids, None), own_loss(backbone, ids, mask))


def test_only_when_asked_and_only_of_experts():
    ids, _ = data()
    moe = MultiExitModel(tiny_model("mixtral"), ExitConfig(layers=[2]))
    assert has_routers(moe.backbone)
    assert moe(ids).router_loss is None
    dense = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[2]))
    assert not has_routers(dense.backbone)
    assert dense(ids, routers=True).router_loss is None


def test_the_head_of_an_exit_does_not_count():
    """A block head has a router of its own, which the backbone's loss must not see."""
    ids, _ = data()
    plain = MultiExitModel(tiny_model("mixtral"), ExitConfig(layers=[2]))
    heads = MultiExitModel(tiny_model("mixtral"), ExitConfig(layers=[2], head="block"))
    assert torch.equal(plain(ids, routers=True).router_loss, heads(ids, routers=True).router_loss)


def test_stopping_early_counts_the_blocks_run():
    ids, _ = data()
    backbone = tiny_model("mixtral")
    model = MultiExitModel(backbone, ExitConfig(layers=[2]))
    short = model(ids, routers=True, full_depth=False).router_loss
    cut = tiny_model("mixtral")
    cut.model.layers = cut.model.layers[:2]
    torch.testing.assert_close(short, own_loss(cut, ids, None), rtol=0, atol=1e-12)


def test_no_hooks_are_left():
    model = MultiExitModel(tiny_model("mixtral"), ExitConfig(layers=[2]))
    ids, _ = data()
    model(ids, routers=True)
    assert not any(module._forward_hooks for module in model.modules())


def test_reentrant_checkpoints_are_refused():
    """They run the blocks without autograd: the loss would be right and its gradient nothing."""
    backbone = tiny_model("mixtral")
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = MultiExitModel(backbone, ExitConfig(layers=[2])).train()
    ids, _ = data()
    model(ids)
    with pytest.raises(ConfigError, match="no gradient under reentrant activation checkpointing") as caught:
        model(ids, routers=True)
    assert "use_reentrant" in caught.value.hint
