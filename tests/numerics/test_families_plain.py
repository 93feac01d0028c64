"""`never` is the plain model, `always:l` is the backbone cut at block l: in every family, bit for bit where said."""

from __future__ import annotations

import copy

import pytest
import torch
from families_support import ALL, backbone, dtype_of, multi_exit, sequences
from transformers import DynamicCache

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import decoder_of
from eetrain.backbones.anatomy import submodule
from eetrain.testing.tiny import tiny_model

NEW = 6


def generated(model, data, **options):
    ids, mask, _ = data.until(data.prompt)
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, **wanted, **options)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_never_equals_the_backbones_own_generate_bitwise(family, dtype):
    if dtype == torch.float64 and dtype_of(family) != torch.float64:
        pytest.skip("transformers' eager attention of gemma2 gives NaN on padded rows in float64")
    plain = tiny_model(family, dtype=dtype, eos_token_id=None)
    model = MultiExitModel(plain, ExitConfig(layers=[1, 3]))
    want, got = generated(plain, sequences()), generated(model, sequences(), exit_policy="never")
    assert want.sequences.shape[1] == 11 + NEW > 8, "the sliding window must be passed"
    check_equal(got, want, bitwise=not slides(plain))
    assert got.exit_trace.tolist() == [[4] * NEW] * 3
    if slides(plain):
        # transformers' sliding cache cuts old keys off, so sums have another length; its plain cache does not.
        check_equal(got, generated(plain, sequences(), past_key_values=DynamicCache()), bitwise=True)


@pytest.mark.parametrize("family", ALL)
def test_never_in_one_unpadded_row_equals_generate_bitwise(family):
    plain, data = backbone(family), sequences(lengths=(13,))
    check_equal(generated(multi_exit(family), data), generated(plain, data), bitwise=not slides(plain))


def slides(plain) -> bool:
    return (
        "sliding_attention" in (getattr(plain.config, "layer_types", None) or ())
        or plain.config.model_type == "mistral"
    )


def check_equal(got, want, bitwise: bool) -> None:
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.logits) == len(got.scores) == NEW
    tolerance = {"rtol": 0, "atol": 0} if bitwise else {"rtol": 0, "atol": 1e-6}
    for name in ("logits", "scores"):
        for mine, theirs in zip(getattr(got, name), getattr(want, name), strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)


def cut(family: str, layer: int, norm=None):
    """The backbone with its first blocks only and, if given, another final norm."""
    model = copy.deepcopy(backbone(family))
    anatomy = multi_exit(family).anatomy
    decoder = decoder_of(model, anatomy)
    parent, _, name = anatomy.blocks.rpartition(".")
    setattr(submodule(decoder, parent), name, submodule(decoder, anatomy.blocks)[:layer])
    if norm is not None:
        parent, _, name = anatomy.norm.rpartition(".")
        setattr(submodule(decoder, parent), name, norm)
    config = model.config
    config.num_hidden_layers = layer
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layer]
    return model


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", ["tied", "norm"])
def test_always_equals_the_cut_backbone(family, head):
    model = multi_exit(family, head, (1, 2, 3, 4))
    for layer in (1, 2, 3, 4):
        plain = cut(family, layer, model.head(layer).norm)
        want = generated(plain, sequences())
        got = generated(model, sequences(), exit_policy=f"always:{layer}")
        assert torch.equal(got.sequences, want.sequences), layer
        for mine, theirs in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
        assert got.exit_trace.unique().tolist() == [layer]


@pytest.mark.parametrize("family", ALL)
def test_always_at_the_last_block_uses_that_exits_head(family):
    model = multi_exit(family, "norm", (1, 2, 3, 4))
    last, full = (generated(model, sequences(), exit_policy=policy) for policy in ("always:4", "never"))
    assert not torch.allclose(last.logits[0], full.logits[0], atol=1e-3), "the heads are perturbed: they must differ"
