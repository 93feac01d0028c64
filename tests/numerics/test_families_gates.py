"""Decoding by gates: decisions are those of gates computed from teacher-forced logits, batch = rows alone."""

from __future__ import annotations

import pytest
import torch
from families_support import (
    Sequences,
    backbone,
    between,
    close,
    drive,
    emitted,
    expected_depths,
    mixed,
    perturb,
    sequences,
    teacher_forced,
)

from eetrain import ExitConfig, MultiExitModel
from eetrain.decoding import parse_policy
from eetrain.exits.gates import GateConfig
from eetrain.exits.gating import gate_features

FAMILIES = ("llama", "gemma3_text", "gpt2", "qwen3_moe")
LENGTH = 6


def gate_logits(model, data: Sequences, position_length: int | None, shift: int = 0) -> torch.Tensor:
    """``[G, B, S]``: the gates of cost weight 1, written out with the weights, for the token each slot predicts."""
    logits = teacher_forced(model, data)
    found = []
    for layer in model.exit_layers:
        inputs = gate_features(logits[layer].flatten(0, 1)).float()
        if position_length is not None:
            index_BS = (torch.arange(data.steps + 1) + shift).expand(len(data.ids_BT), -1)
            inputs = torch.cat([inputs, (index_BS.reshape(-1, 1) / position_length).clamp(0, 1)], -1)
        linear = model.gate(layer).output
        found.append((inputs @ linear.weight[1] + linear.bias[1]).view(len(data.ids_BT), -1))
    return torch.stack(found).detach()


def gated(family: str, data: Sequences, position_length: int | None) -> MultiExitModel:
    """Gates of cost weight 0.1 always open; those of 1 open for 4 in 10 tokens at each exit."""
    config = ExitConfig(layers=[1, 2, 3], gates=GateConfig([0.1, 1.0], position_length=position_length))
    model = MultiExitModel(backbone(family), config).eval()
    perturb(model.exits)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.exit_layers:
            linear = model.gate(layer).output
            linear.weight.copy_(5 * torch.randn(linear.weight.shape, generator=generator))
            if position_length is not None:
                linear.weight[1, 4] = 0.3 * (-1) ** layer
            linear.bias.copy_(torch.tensor([100.0, 0.0]))
        for place, values in enumerate(gate_logits(model, data, position_length)):
            model.gate(place + 1).output.bias[1] = -between(values, 0.6)
    return model


def chances(gates_GBS: torch.Tensor, conditional: bool) -> torch.Tensor:
    """What is compared with 0.5 at each exit, by the published formulas."""
    if not conditional:
        return gates_GBS
    spent, arriving, found = torch.zeros(()), torch.ones(()), []
    for gate_BS in gates_GBS.double():
        share = torch.minimum(gate_BS, 1 - spent).clamp(min=0)
        chance = torch.where(arriving > 0, (share / arriving).clamp(0, 1), 0.0)
        spent, arriving = spent + share, arriving * (1 - chance)
        found.append(chance)
    return torch.stack(found)


def expected(model, data, position_length, conditional, cap=8, shift=0) -> torch.Tensor:
    gates = torch.sigmoid(gate_logits(model, data, position_length, shift))
    chance = chances(gates, conditional)
    assert (chance - 0.5).abs().min() > 1e-6, "rounding could flip a decision: choose other ids"
    opens = {layer: (chance[place] >= 0.5).double() for place, layer in enumerate(model.exit_layers)}
    return expected_depths(opens, 0.5, 4, cap)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("position_length", [None, LENGTH])
@pytest.mark.parametrize("conditional", [False, True])
def test_depths_and_logits_are_the_teacher_forced_ones(family, position_length, conditional):
    data = sequences()
    model = gated(family, data, position_length)
    text = "gate:0.5,cost_weight=1" + (",conditional=true" if conditional else "")
    run = drive(model, parse_policy(text), data)
    depth = expected(model, data, position_length, conditional)
    assert run.depth_BS.tolist() == depth.tolist()
    assert mixed(depth)
    torch.testing.assert_close(run.logits_BSV, emitted(teacher_forced(model, data), depth), **close(family))
    assert depth.tolist() != expected(model, data, position_length, not conditional).tolist()
    if position_length is not None:
        for shift in (-1, 1):
            other = expected(model, data, position_length, conditional, shift=shift)
            assert depth.tolist() != other.tolist(), "the index makes no difference here"
    for row in range(3):
        alone = drive(model, parse_policy(text), data.row(row))
        assert alone.depth_BS[0].tolist() == depth[row].tolist()
        torch.testing.assert_close(alone.logits_BSV[0], run.logits_BSV[row], **close(family))


@pytest.mark.parametrize("cap", [1, 3])
def test_waiting_tokens_are_capped(cap):
    data = sequences()
    model = gated("llama", data, None)
    run = drive(model, parse_policy(f"gate:0.5,cost_weight=1,cap={cap}"), data)
    depth = expected(model, data, None, False, cap)
    assert run.depth_BS.tolist() == depth.tolist()
    assert depth.tolist() != expected(model, data, None, False).tolist()


def test_each_exit_has_its_own_value_and_each_cost_weight_its_own_gates():
    data = sequences()
    model = gated("llama", data, None)
    gates = torch.sigmoid(gate_logits(model, data, None))
    values = [between(gates[place], quantile) for place, quantile in enumerate((0.8, 0.3, 0.6))]
    text = f"gate:{'+'.join(map(repr, values))},cost_weight=1"
    opens = {place + 1: (gates[place] >= value).double() for place, value in enumerate(values)}
    want = expected_depths(opens, 0.5, 4, 8)
    assert drive(model, parse_policy(text), data).depth_BS.tolist() == want.tolist()
    assert want.tolist() != expected(model, data, None, False).tolist()
    always = drive(model, parse_policy("gate:0.5,cost_weight=0.1"), data)
    assert always.depth_BS[:, 1:].unique().tolist() == [1]


def test_gates_choose_depths_under_propagation_too():
    """The first token that is fed sees repaired keys nowhere yet: its decision is the teacher-forced one."""
    data = sequences()
    model = gated("llama", data, LENGTH)
    run = drive(model, parse_policy("gate:0.5,cost_weight=1,repair=propagate"), data)
    want = expected(model, data, LENGTH, False, cap=100)
    assert run.depth_BS[:, 1].tolist() == want[:, 1].tolist()
    assert set(run.depth_BS[:, 1:].unique().tolist()) >= {1, 4}
    for row in range(3):
        alone = drive(model, parse_policy("gate:0.5,cost_weight=1,repair=propagate"), data.row(row))
        torch.testing.assert_close(alone.logits_BSV[0], run.logits_BSV[row], **close("llama"))
