"""Shadows share everything but the replaced paths; recorders keep what they were given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eetrain.backbones import Harvester, call_block, dissect
from eetrain.backbones.recorder import Recorder, Tap, hidden_of
from eetrain.backbones.shadow import shadow
from eetrain.testing.tiny import FAMILIES, tiny_model


def tree() -> nn.Module:
    return nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2), "c": nn.Linear(2, 2)}), "d": nn.Linear(2, 2)})


def test_only_the_path_is_copied():
    root = tree()
    before = {name: id(module) for name, module in root.named_modules()}
    put = nn.Identity()
    copied = shadow(root, {"a.b": put})
    assert copied is not root
    assert copied["a"] is not root["a"]
    assert copied["a"]["b"] is put
    assert copied["a"]["c"] is root["a"]["c"]
    assert copied["d"] is root["d"]
    assert {name: id(module) for name, module in root.named_modules()} == before


def test_several_paths_at_once():
    root = tree()
    one, two = nn.Identity(), nn.Identity()
    copied = shadow(root, {"a.b": one, "d": two})
    assert copied["a"]["b"] is one
    assert copied["d"] is two
    assert isinstance(root["d"], nn.Linear)


def test_parameters_are_shared_not_copied():
    root = tree()
    copied = shadow(root, {"a.b": nn.Identity()})
    with torch.no_grad():
        root["d"].weight.fill_(3.0)
    assert copied["d"].weight.eq(3.0).all()


def test_hooks_of_copied_modules_are_left_behind_and_those_of_shared_ones_are_not():
    root = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    seen = []
    for name, module in root.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
    shadow(root, {"1.0": nn.Identity()})(torch.ones(1, 2))
    assert seen == ["before 0", "0"]
    root(torch.ones(1, 2))
    assert seen[2:] == ["before ", "before 0", "0", "before 1", "before 1.0", "1.0", "1", ""]


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_a_recorder_passes_on_and_forgets_when_taken(returns_tuple):
    block = nn.Linear(2, 2)
    block.attention_type = "sliding_attention"
    recorder = Recorder(block, returns_tuple)
    hidden, mask = torch.ones(1, 2), torch.zeros(1)
    output = recorder(hidden, mask, use_cache=False)
    assert isinstance(output, tuple) is returns_tuple
    assert hidden_of(output) is hidden
    assert recorder.attention_type == "sliding_attention"
    assert not list(recorder.parameters()), "the block must not become a submodule"
    call, taken = recorder.take()
    assert taken is hidden
    assert call.args == (mask,)
    assert call.kwargs == {"use_cache": False}
    assert recorder.take() == (None, None)


def test_a_recorder_takes_the_hidden_state_by_name_too():
    recorder = Recorder(nn.Identity())
    given = {"hidden_states": torch.ones(1), "mask": None}
    assert recorder(**given) is given["hidden_states"]
    assert recorder.take()[0].kwargs == {"mask": None}
    assert "hidden_states" in given


def test_a_tap_runs_the_block_and_keeps_its_output():
    block = nn.Linear(2, 2)
    tap = Tap(block)
    hidden = torch.ones(1, 2)
    assert torch.equal(tap(hidden), block(hidden))
    assert torch.equal(tap.output, block(hidden))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_harvested_calls_run_the_real_blocks_in_any_split(family):
    model = tiny_model(family)
    ids = torch.arange(3, 15)[None]
    harvester = Harvester(model, dissect(model))
    harvest = harvester(ids)
    whole = harvester.run(harvest, harvest.hidden_BTD, range(1, 5))
    split = harvester.run(harvest, harvester.run(harvest, harvest.hidden_BTD, (1, 2, 3)), (4,))
    single = harvest.hidden_BTD
    for block, call in zip(harvester.blocks, harvest.calls, strict=True):
        single = call_block(block, single, call)
    want = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(harvest.hidden_BTD, want[0])
    assert torch.equal(whole, split)
    assert torch.equal(whole, single)
    by_embeddings = harvester(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(by_embeddings.hidden_BTD, harvest.hidden_BTD)
    assert len(Harvester(model, dissect(model), depth=2)(ids).calls) == 2
