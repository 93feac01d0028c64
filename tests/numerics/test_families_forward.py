"""MultiExitModel.forward against transformers' own forward: states, logits, gradients, memory, packed documents."""

from __future__ import annotations

import copy

import pytest
import torch
from families_support import ALL, close, multi_exit, perturb, positions_of, sequences
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import blocks_of
from eetrain.errors import UnsupportedModelError
from eetrain.testing.tiny import tiny_model

HEADS = ("tied", "norm", "mlp", "block")


def fresh(family: str, head: str, dtype: torch.dtype = torch.float64, output: str = "tied", **changes):
    model = MultiExitModel(
        tiny_model(family, dtype=dtype, **changes), ExitConfig(layers=[1, 3], head=head, output=output)
    )
    perturb(model.exits)
    return model


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_states_and_logits_are_transformers_own_bitwise(family, padded):
    model, data = multi_exit(family), sequences()
    ids, mask = data.ids_BT, data.mask_BT
    if not padded:
        ids, mask = ids[:, 5:], None
    output = model(ids, mask, None if mask is None else data.positions_BT)
    positions = {} if mask is None else {"position_ids": data.positions_BT}
    want = model.causal_lm(ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **positions)
    for layer in model.exit_layers:
        assert torch.equal(output.hidden[layer], want.hidden_states[layer]), layer
    assert torch.equal(model.logits(output), want.logits)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_forward_may_stop_at_the_deepest_exit(family):
    model, data = multi_exit(family), sequences()
    calls: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_args, number=number: calls.append(number))
        for number, block in enumerate(blocks_of(model.backbone, model.anatomy), start=1)
    ]
    try:
        short = model(data.ids_BT, data.mask_BT, data.positions_BT, exits=(2, 1), full_depth=False)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [1, 2]
    assert short.full_features is None
    assert sorted(short.hidden) == sorted(short.features) == sorted(short.projections) == [1, 2]
    long = model(data.ids_BT, data.mask_BT, data.positions_BT)
    for layer in (1, 2):
        assert torch.equal(model.logits(short, layer), model.logits(long, layer))
    with pytest.raises(AssertionError, match="stopped before the last block"):
        model.logits(short)


def naive_loss(backbone, model, ids, labels, mask, positions):
    """Cross-entropy of all exits and the full depth, from `output_hidden_states` of the plain model."""
    output = backbone(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False)
    norm, shared = model.shared_tail()
    total = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    for layer in model.exit_layers:
        head = model.head(layer)
        logits = shared((norm if head.norm is None else head.norm)(output.hidden_states[layer]))
        total = total + layer * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return total


def multi_exit_loss(model, ids, labels, mask, positions):
    output = model(ids, mask, positions)
    total = F.cross_entropy(model.logits(output).flatten(0, 1), labels.flatten())
    for layer in model.exit_layers:
        total = total + layer * F.cross_entropy(model.logits(output, layer).flatten(0, 1), labels.flatten())
    return total


def gradients(loss, model) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", ["tied", "norm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_naive_forward(family, head, checkpointing):
    model, data = fresh(family, head), sequences(lengths=(9, 9), steps=0)
    ids, labels = data.ids_BT, data.ids_BT.roll(-1, 1)
    want = gradients(naive_loss(model.backbone, model, ids, labels, None, None), model)
    if checkpointing:
        model.backbone.gradient_checkpointing_enable()
        model.train()
    got = gradients(multi_exit_loss(model, ids, labels, None, None), model)
    assert set(got) == set(want) == {name for name, _ in model.named_parameters()}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-10, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("output", ["tied", "own"])
def test_every_parameter_of_every_head_takes_part(family, head, output):
    """A parameter without gradient would make DistributedDataParallel wait for ever."""
    if head == "tied" and output == "own":
        pytest.skip("refused: a tied head has no parameters")
    model = fresh(family, head, output=output)
    model.backbone.requires_grad_(False)
    data = sequences(lengths=(9, 9), steps=0)
    result = model(data.ids_BT)
    loss = sum(F.cross_entropy(model.logits(result, layer).flatten(0, 1), data.ids_BT.flatten()) for layer in (1, 3))
    if head == "tied":
        assert not list(model.exits.parameters())
        assert not loss.requires_grad
        return
    loss.backward()
    without = [name for name, parameter in model.exits.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.exits.parameters())


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
def test_a_frozen_backbone_saves_no_activations(family, head):
    model = fresh(family, head)
    model.backbone.requires_grad_(False)
    data = sequences(lengths=(9, 9), steps=0)
    inside, saved = [False], {"under the backbone": 0, "in the heads": 0}

    def pack(tensor):
        saved["under the backbone" if inside[0] else "in the heads"] += 1
        return tensor

    def switch(value):
        return lambda *_args, **_kwargs: inside.__setitem__(0, value)

    for block in blocks_of(model.backbone, model.anatomy):
        block.register_forward_pre_hook(switch(True))
        block.register_forward_hook(switch(False))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(data.ids_BT, full_depth=False)
    assert saved["under the backbone"] == 0
    assert saved["in the heads"] > 0
    assert all(not state.requires_grad for state in result.hidden.values())
    model.backbone.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(data.ids_BT, full_depth=False)
    assert saved["under the backbone"] > 0, "the count above can tell"


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", ["norm", "block"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_documents_equal_documents_alone(family, head, attention):
    """Documents longer than the sliding window, positions restarting, no mask."""
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa attention for gemma2")
    model = fresh(family, head, attn_implementation=attention)
    assert model.causal_lm.config._attn_implementation == attention
    data = sequences(lengths=(29, 29), steps=0)
    ids, cuts = data.ids_BT, ((12, 26), (3, 5))
    starts = [torch.tensor([0, *cut, 29]) for cut in cuts]
    positions = torch.stack([torch.cat([torch.arange(int(n)) for n in start.diff()]) for start in starts])
    packed = model(ids, position_ids=positions)
    for row, start in enumerate(starts):
        for first, last in zip(start[:-1].tolist(), start[1:].tolist(), strict=True):
            alone = model(ids[row : row + 1, first:last])
            for layer in (1, 3, None):
                got = model.logits(packed, layer)[row : row + 1, first:last]
                # eager attention of some families computes its softmax in float32
                tolerance = {"rtol": 0, "atol": 1e-10 if attention == "sdpa" else 1e-5}
                torch.testing.assert_close(got, model.logits(alone, layer), **tolerance)


@pytest.mark.parametrize("family", ALL)
def test_packed_documents_train_like_documents_alone(family):
    model, data = fresh(family, "norm"), sequences(lengths=(20,), steps=0)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    ids = data.ids_BT
    labels = ids.roll(-1, 1)
    labels[:, [11, 19]] = -100

    def summed(output, wanted):
        losses = [
            F.cross_entropy(model.logits(output, x).flatten(0, 1), wanted.flatten(), reduction="sum") for x in (1, None)
        ]
        return losses[0] + losses[1]

    packed = gradients(summed(model(ids, position_ids=positions), labels), model)
    pieces = [summed(model(ids[:, part]), labels[:, part]) for part in (slice(0, 12), slice(12, 20))]
    alone = gradients(pieces[0] + pieces[1], model)
    # gemma's norms and eager attention work in float32 whatever the weights' type
    tolerance = {"rtol": 0, "atol": 1e-9} if not family.startswith("gemma") else {"rtol": 1e-3, "atol": 2e-5}
    for name in alone:
        torch.testing.assert_close(packed[name], alone[name], **tolerance)


def test_packing_is_refused_where_positions_do_not_reach_the_attention():
    model = MultiExitModel(AutoModelForCausalLM.from_config(BloomConfig(**BLOOM)).eval(), ExitConfig(layers=[1]))
    ids = sequences(lengths=(10,), steps=0).ids_BT
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    with pytest.raises(UnsupportedModelError, match="BloomModel cannot keep packed documents apart") as caught:
        model(ids, position_ids=positions)
    assert "Turn packing off" in caught.value.hint
    whole = model(ids, position_ids=torch.arange(10)[None])
    assert torch.equal(model.logits(whole), model.causal_lm(ids).logits)


BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 4, "n_head": 4}


def test_positions_of_padded_rows_are_not_taken_for_packing():
    model, data = multi_exit("opt"), sequences()
    with torch.no_grad():
        padded = model(data.ids_BT, data.mask_BT, positions_of(data.mask_BT))
        for row in range(3):
            one = data.row(row)
            alone = model(one.ids_BT)
            got = model.logits(padded)[row, -one.ids_BT.shape[1] :]
            torch.testing.assert_close(got, model.logits(alone)[0], **close("opt"))


def test_a_copy_trains_its_own_weights():
    model = fresh("llama", "norm")
    twin = copy.deepcopy(model)
    ids = sequences(lengths=(9,), steps=0).ids_BT
    multi_exit_loss(twin, ids, ids, None, None).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())
