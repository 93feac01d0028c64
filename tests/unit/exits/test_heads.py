"""What heads are at the start, what they own, and what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig, OlmoConfig

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import blocks_of, final_norm
from eetrain.errors import ConfigError, UnsupportedModelError
from eetrain.testing.tiny import FAMILIES, tiny_model

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("output", ["tied", "own"])
@torch.no_grad()
def test_a_norm_head_at_the_last_block_starts_as_the_full_model(family, output):
    model = MultiExitModel(tiny_model(family), ExitConfig(layers=[2, 4], output=output))
    result = model(IDS)
    assert torch.equal(model.logits(result, 4), model.logits(result))
    assert not torch.allclose(model.logits(result, 2), model.logits(result), atol=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_block_head_is_the_last_block_then_the_norm(family):
    """After block 3 the copy of block 4 gives the full model; after block 1, block 4 on h_1."""
    plain = tiny_model(family)
    model = MultiExitModel(plain, ExitConfig(layers=[1, 3], head="block"))
    result = model(IDS)
    torch.testing.assert_close(model.logits(result, 3), model.logits(result), rtol=0, atol=1e-12)
    want = _without_blocks(model, blocks_of(plain, model.anatomy), (2, 3))
    torch.testing.assert_close(model.logits(result, 1), want, rtol=0, atol=1e-12)


def _without_blocks(model, blocks, skipped) -> torch.Tensor:
    """The plain model's own forward with hooks that pass the state by the skipped blocks."""
    handles = [blocks[number - 1].register_forward_hook(lambda _m, args, _out: args[0]) for number in skipped]
    try:
        return model.causal_lm(IDS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


MLP_BY_HAND = {
    "llama": lambda block, h: h + block.mlp(block.post_attention_layernorm(h)),
    "gpt2": lambda block, h: h + block.mlp(block.ln_2(h)),
    "opt": lambda block, h: h + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(h)))),
    "gemma2": lambda block, h: h + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(h))),
    "gpt_neox": lambda block, h: h + block.mlp(block.post_attention_layernorm(h)),
    "olmo2": lambda block, h: h + block.post_feedforward_layernorm(block.mlp(h)),
}


@pytest.mark.parametrize("family", sorted(MLP_BY_HAND))
@torch.no_grad()
def test_an_mlp_head_is_the_exits_own_mlp_then_the_norm(family):
    plain = tiny_model(family)
    model = MultiExitModel(plain, ExitConfig(layers=[2], head="mlp"))
    result = model(IDS)
    want = MLP_BY_HAND[family](blocks_of(plain, model.anatomy)[1], result.hidden[2])
    want = final_norm(plain, model.anatomy)(want)
    torch.testing.assert_close(result.features[2], want, rtol=0, atol=1e-12)


def test_a_tied_head_owns_nothing():
    model = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[1, 2], head="tied"))
    assert not list(model.exits.parameters())
    assert not [name for name in model.state_dict() if name.startswith("exits.")]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_how_many_parameters_each_kind_owns(family):
    plain = tiny_model(family)
    block = count(blocks_of(plain, MultiExitModel(plain, ExitConfig(layers=[])).anatomy)[3])
    norm = count(final_norm(plain, MultiExitModel(plain, ExitConfig(layers=[])).anatomy))
    matrix = 61 * 32
    sizes = {
        head: count(MultiExitModel(plain, ExitConfig(layers=[1], head=head)).exits)
        for head in ("tied", "norm", "mlp", "block")
    }
    assert (sizes["tied"], sizes["norm"], sizes["block"]) == (0, norm, block + norm)
    assert norm < sizes["mlp"] < block + norm, "the attention is not part of it"
    own = MultiExitModel(plain, ExitConfig(layers=[1, 2], head="norm", output="own"))
    assert count(own.exits) == 2 * (norm + matrix)


def test_an_mlp_head_drops_what_only_fed_the_attention():
    names = [name for name, _ in _head("llama", "mlp").named_parameters()]
    assert names == [
        "inner.mlp.gate_proj.weight",
        "inner.mlp.up_proj.weight",
        "inner.mlp.down_proj.weight",
        "inner.post_attention_layernorm.weight",
        "norm.weight",
    ]


def _head(family: str, head: str, **kwargs) -> nn.Module:
    return MultiExitModel(tiny_model(family), ExitConfig(layers=[2], head=head, **kwargs)).head(2)


@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
def test_heads_share_no_memory_with_the_backbone_or_each_other(head):
    model = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[1, 2], head=head, output="own"))
    seen = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(seen)) == len(seen)
    first, second = model.head(1).output.weight, model.head(2).output.weight
    assert torch.equal(first, model.causal_lm.lm_head.weight)
    assert torch.equal(first, second)


def test_own_matrices_copy_the_bias_too():
    config = GPTJConfig(vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=64, rotary_dim=4)
    plain = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        plain.lm_head.bias.normal_()
    model = MultiExitModel(plain, ExitConfig(layers=[4], output="own"))
    assert torch.equal(model.head(4).output.bias, plain.lm_head.bias)
    assert model.head(4).output.bias is not plain.lm_head.bias
    with torch.no_grad():
        result = model(IDS)
        assert torch.equal(model.logits(result, 4), model.logits(result))


@torch.no_grad()
def test_own_matrices_keep_the_backbones_scaling():
    """Gemma 2 soft-caps its logits: so must an exit with a matrix of its own."""
    model = MultiExitModel(tiny_model("gemma2", final_logit_softcapping=0.5), ExitConfig(layers=[1], output="own"))
    result = model(IDS)
    assert result.projections[1].softcap == 0.5
    assert model.logits(result, 1).abs().max() < 0.5


def test_heads_train_even_if_the_backbone_is_frozen():
    plain = tiny_model("llama").requires_grad_(False)
    for head in ("norm", "mlp", "block"):
        model = MultiExitModel(plain, ExitConfig(layers=[1], head=head))
        assert all(parameter.requires_grad for parameter in model.exits.parameters())
    assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_a_norm_without_parameters_cannot_be_a_head():
    config = OlmoConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    plain = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="this backbone's final norm has no parameters to train") as caught:
        MultiExitModel(plain, ExitConfig(layers=[1]))
    assert "exits.output=own" in caught.value.hint
    assert count(MultiExitModel(plain, ExitConfig(layers=[1], output="own")).exits) == 61 * 32


def test_an_mlp_head_needs_one_attention():
    plain = tiny_model("llama")
    for block in plain.model.layers:
        del block.self_attn.layer_idx
    with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer has 0 parts that look like attention") as caught:
        MultiExitModel(plain, ExitConfig(layers=[1], head="mlp"))
    assert "exits.head=norm" in caught.value.hint
