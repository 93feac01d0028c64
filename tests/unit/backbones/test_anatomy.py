"""What `dissect` finds in families beyond the fourteen, and what it refuses, with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import parse
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import blocks_of, decoder_of, dissect, final_norm, output_projection
from eetrain.decoding import Threshold
from eetrain.errors import UnsupportedModelError
from eetrain.testing.tiny import FAMILIES, tiny_config, tiny_model

SMALL = {"vocab_size": 61, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
HEADS = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
OTHERS = {
    "cohere": {**SMALL, **HEADS, "logit_scale": 0.25},
    "granite": {**SMALL, **HEADS, "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "falcon": {**SMALL, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": False},
    "bloom": {**SMALL, "n_layer": 4, "n_head": 4},
    "mpt": {
        **{k: v for k, v in SMALL.items() if k != "hidden_size"},
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "max_seq_len": 64,
    },
    "gptj": {"vocab_size": 61, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "starcoder2": {**SMALL, **HEADS},
    "phi": {**SMALL, **HEADS},
    "glm4": {**SMALL, **HEADS, "head_dim": 8},
    "smollm3": {**SMALL, **HEADS},
    "olmo": {**SMALL, **HEADS},
}


def other(family: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**OTHERS[family])).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.08))
    return model


def ids_of(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_parts_of_every_family(family):
    model = tiny_model(family)
    anatomy = dissect(model)
    assert (anatomy.num_blocks, anatomy.hidden_size, anatomy.vocab_size) == (4, 32, 61)
    assert anatomy.takes_cache
    assert anatomy.takes_position_ids
    assert not anatomy.returns_tuple
    assert anatomy.scale == 1.0
    assert anatomy.softcap == (30.0 if family == "gemma2" else None)
    assert anatomy.decoder == model.base_model_prefix
    names = dict(decoder_of(model, anatomy).named_modules())
    assert blocks_of(model, anatomy) is names[anatomy.blocks]
    assert final_norm(model, anatomy) is names[anatomy.norm]
    assert "norm" in anatomy.norm or anatomy.norm == "ln_f"
    assert output_projection(model, anatomy).weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(("family", "scale"), [("cohere", 0.25), ("granite", 1 / 8.0)])
def test_factors_on_the_logits_are_found(family, scale):
    anatomy = dissect(other(family))
    assert anatomy.scale == pytest.approx(scale, rel=1e-12)
    assert anatomy.softcap is None


@pytest.mark.parametrize("family", sorted(OTHERS))
@torch.no_grad()
def test_other_families_forward_equals_their_own(family):
    plain = other(family)
    model = MultiExitModel(plain, ExitConfig(layers=[1, 4], head="tied"))
    ids = ids_of()
    output = model(ids)
    want = plain(ids, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(model.logits(output), want.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.logits(output, 4), want.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.hidden[1], want.hidden_states[1], rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted(OTHERS))
@pytest.mark.parametrize("repair", ["recompute", "propagate"])
def test_other_families_decode(family, repair):
    """Never equals their own generate; rows under a threshold equal rows alone."""
    plain = other(family).float()  # eager attention gives NaN on padded rows in float64
    model = MultiExitModel(plain, ExitConfig(layers=[1, 2], head="tied"))
    ids = ids_of(3, 9)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    kwargs = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "repetition_penalty": 1.5,
        "suppress_tokens": [0],
    }
    want = plain.generate(ids, attention_mask=mask, **kwargs)
    assert torch.equal(model.generate(ids, attention_mask=mask, exit_policy="never", **kwargs), want)
    logged = {"return_dict_in_generate": True, "output_logits": True}
    for value in (0.03, 0.05, 0.08):
        policy = Threshold(value, repair=repair)
        out = model.generate(ids, attention_mask=mask, exit_policy=policy, **kwargs, **logged)
        alone = model.generate(ids[1:2, 4:], exit_policy=policy, **kwargs, **logged)
        assert torch.equal(out.exit_trace[1], alone.exit_trace[0])
        for batch, single in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(batch[1], single[0], rtol=0, atol=1e-5)


def test_mamba_trains_but_does_not_decode():
    config = CONFIG_MAPPING["mamba"](**SMALL, num_hidden_layers=4, state_size=4)
    model = MultiExitModel(AutoModelForCausalLM.from_config(config).eval(), ExitConfig(layers=[2]))
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(model.logits(model(ids)), model.causal_lm(ids).logits)
    with pytest.raises(UnsupportedModelError, match="needs attention blocks with a key/value cache; this backbone has"):
        model.generate(ids, max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match="cannot keep packed documents apart"):
        model(ids, position_ids=torch.arange(6).repeat(2)[None].expand(2, -1))


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is not a decoder-only causal language"):
        dissect(T5ForConditionalGeneration(config))


def test_a_bare_module_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear is not a decoder-only") as caught:
        dissect(nn.Linear(2, 2))
    assert "one ModuleList" in caught.value.hint


class ChangingModel(LlamaModel):
    """Scales the hidden state between blocks, which eetrain's plain loop would miss."""

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(hidden.shape[1])[None]
        tables = self.rotary_emb(hidden, positions)
        for block in self.layers:
            hidden = self.between(block(hidden, attention_mask=None, position_embeddings=tables))
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.after(self.norm(hidden)))

    between = staticmethod(lambda hidden: hidden * 2)
    after = staticmethod(lambda hidden: hidden)


class ChangingAfterNorm(ChangingModel):
    between = staticmethod(lambda hidden: hidden)
    after = staticmethod(lambda hidden: hidden + 1)


class SkippingModel(ChangingModel):
    """Runs only every second of its blocks."""

    between = staticmethod(lambda hidden: hidden)

    def forward(self, *args, **kwargs):
        whole = self.layers
        self._modules["layers"] = whole[::2]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._modules["layers"] = whole


def with_decoder(decoder):
    model = LlamaForCausalLM(tiny_config("llama"))
    model.model = decoder(model.config)
    return model.eval()


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (ChangingModel, "skips block 1 or changes the hidden state after it"),
        (SkippingModel, "skips block 1 or changes the hidden state after it"),
        (ChangingAfterNorm, "changes the hidden state between final norm and output matrix"),
    ],
)
def test_decoders_that_do_more_than_run_blocks_are_refused(decoder, reason):
    with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM {reason}"):
        dissect(with_decoder(decoder))


class ShapingLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits**2
        return output


def test_logits_of_an_unknown_shape_are_refused():
    with pytest.raises(UnsupportedModelError, match="shapes its logits in a way eetrain does not know") as caught:
        dissect(ShapingLogits(tiny_config("llama")).eval())
    assert "final_logit_softcapping" in caught.value.hint


def test_two_block_lists_of_one_depth_are_refused():
    model = tiny_model("llama")
    model.model.others = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(UnsupportedModelError, match="looked for one list of 4 blocks, found layers, others"):
        dissect(model)
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="looked for one list of 7 blocks, found none"):
        dissect(model)


def test_opt_with_projections_around_its_blocks_is_refused():
    with pytest.raises(UnsupportedModelError, match="between final norm and output matrix"):
        dissect(tiny_model("opt", word_embed_proj_dim=16))


def lora(model, **changes):
    torch.manual_seed(0)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **changes)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return wrapped.eval()


@torch.no_grad()
def test_a_lora_wrapper_runs_with_its_adapter_and_after_merging():
    ids = ids_of()
    bare = tiny_model("llama")
    without = bare(ids).logits
    wrapped = lora(bare)
    want = wrapped(ids).logits
    assert not torch.allclose(want, without, atol=1e-3)
    model = MultiExitModel(wrapped, ExitConfig(layers=[2], head="block"))
    output = model(ids)
    assert torch.equal(model.logits(output), want)
    early = model.logits(output, 2)
    assert not [name for name, _ in model.exits.named_parameters() if "lora" in name]
    new = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **new), wrapped.generate(input_ids=ids, **new))
    merged = wrapped.merge_and_unload()
    again = MultiExitModel(merged, ExitConfig(layers=[2], head="block"))
    torch.testing.assert_close(again.logits(again(ids)), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(again.logits(again(ids), 2), early, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
    ],
    ids=["prefix", "prompt"],
)
def test_adapters_that_add_tokens_are_refused(config, kind):
    with pytest.raises(UnsupportedModelError, match=f"PEFT adapter 'default' is of type .*{kind}.*virtual tokens"):
        dissect(get_peft_model(tiny_model("llama"), config))


def test_an_adapter_on_the_output_matrix_is_refused():
    """The exits use the matrix itself; what an adapter adds to its output would be left out without a word."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match=r"an adapter on its output matrix \(lm_head\)"):
        dissect(get_peft_model(tiny_model("llama", tie_word_embeddings=False), config))
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match=r"an adapter on its output matrix \(lm_head\)"):
        dissect(get_peft_model(tiny_model("llama", tie_word_embeddings=False), saved))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("head", ["tied", "norm", "mlp", "block"])
def test_on_the_meta_device_the_same_is_found(family, head):
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(tiny_config(family))
    if head == "mlp" and family in ("mixtral", "qwen3_moe"):
        with pytest.raises(UnsupportedModelError, match="DecoderLayer needs values that the meta device lacks"):
            MultiExitModel(hollow, ExitConfig(layers=[2], head=head))
        return
    if family == "opt" and parse(transformers.__version__) < parse("5.20"):
        with pytest.raises(UnsupportedModelError, match="OPTForCausalLM needs values that the meta device lacks"):
            dissect(hollow)
        return
    real = MultiExitModel(tiny_model(family, dtype=torch.float32), ExitConfig(layers=[2], head=head))
    model = MultiExitModel(hollow, ExitConfig(layers=[2], head=head))
    assert model.anatomy == real.anatomy
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_a_config_that_asks_for_router_logits_is_dissected_without_leaving_hooks():
    model = tiny_model("mixtral", output_router_logits=True)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert dissect(model).num_blocks == 4
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks


def test_a_model_over_several_devices_is_refused():
    model = tiny_model("llama")
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is spread over cpu, disk") as caught:
        dissect(model)
    assert "one device" in caught.value.hint
    model.hf_device_map = {"": "cpu"}
    assert dissect(model).num_blocks == 4


def test_layerdrop_is_reported():
    model = tiny_model("opt", layerdrop=0.999)
    multi = MultiExitModel(model, ExitConfig(layers=[1]))
    multi.train()
    with pytest.raises(UnsupportedModelError, match=r"The decoder called [0-3] of its 4 blocks") as caught:
        multi(ids_of())
    assert "LayerDrop" in caught.value.hint
