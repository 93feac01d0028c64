"""Gates and their arithmetic: closed forms over grids, features against definitions, precision, settings, folders."""

from __future__ import annotations

import itertools

import pytest
import torch

from eetrain import ExitConfig, MultiExitModel
from eetrain.errors import CheckpointError, ConfigError
from eetrain.exits import Gate, GateConfig
from eetrain.exits.gates import cost_name
from eetrain.exits.gating import chosen_exit, conditional, exit_distribution, gate_features, stack_features
from eetrain.objectives.token_statistics import exponentiate_
from eetrain.testing.tiny import tiny_model

EIGHTHS = [place / 8 for place in range(9)]  # exact in binary, so sums are exact


def grid(gates: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(EIGHTHS, repeat=gates)), dtype=torch.float64)


@pytest.mark.parametrize("gates", [1, 2, 3])
def test_the_distribution_is_one_over_the_whole_grid(gates):
    outputs = grid(gates)
    shares = exit_distribution(outputs)
    assert shares.shape == (9**gates, gates + 1)
    assert (shares >= 0).all()
    assert torch.equal(shares.sum(-1), torch.ones(9**gates, dtype=torch.float64))
    for row, wanted in zip(shares.tolist(), outputs.tolist(), strict=True):
        left = 1.0
        for share, gate in zip(row, wanted, strict=False):
            assert share == max(0.0, min(gate, left))
            left -= share
        assert row[-1] == left


def test_the_distribution_of_floats_stays_non_negative_and_sums_to_one():
    outputs = torch.rand(5000, 6, generator=torch.Generator().manual_seed(0))
    shares = exit_distribution(outputs)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(5000), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gates", [1, 2, 3])
def test_leaving_by_conditional_chances_gives_the_distribution_back(gates):
    outputs = grid(gates)
    chances = conditional(outputs)
    shares = exit_distribution(outputs)
    assert ((chances >= 0) & (chances <= 1)).all()
    stays = (1 - chances).cumprod(-1)
    before = torch.cat([torch.ones_like(stays[:, :1]), stays[:, :-1]], -1)
    torch.testing.assert_close(before * chances, shares[:, :-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(stays[:, -1], shares[:, -1], rtol=0, atol=1e-12)
    assert (chances[before == 0] == 0).all(), "nothing comes that far"


def test_the_conditional_rule_leaves_no_later_and_agrees_on_targets():
    outputs = grid(3)
    plain, stacked = chosen_exit(outputs >= 0.5), chosen_exit(conditional(outputs) >= 0.5)
    assert (stacked <= plain).all()
    assert (stacked < plain).any()
    steps = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]).double()
    assert torch.equal(chosen_exit(steps >= 0.5), chosen_exit(conditional(steps) >= 0.5))


def test_the_first_willing_gate_is_chosen():
    leave = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]]).bool()
    assert chosen_exit(leave).tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_from_logits_are_those_of_the_chunked_statistics(dtype):
    logits = 4 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits[3, 7:] = float("-inf")
    features = gate_features(logits)
    probs = logits.double().softmax(-1)
    sharp = probs.square() / probs.square().sum(-1, keepdim=True)
    top = probs.topk(2).values
    entropies = [torch.special.entr(of).sum(-1) for of in (probs, sharp)]
    wanted = torch.stack([top[:, 0], entropies[0], top[:, 0] - top[:, 1], entropies[1]], -1)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-6}
    torch.testing.assert_close(features, wanted.to(dtype), **tolerance)
    _, _, statistics = exponentiate_(logits.clone(), torch.zeros(40, dtype=torch.int64), "all")
    torch.testing.assert_close(stack_features(statistics), features, **tolerance)
    assert features.dtype == dtype


def test_features_of_sixteen_bit_logits_are_computed_in_float32():
    logits = torch.randn(3, 50).bfloat16()
    assert torch.equal(gate_features(logits), gate_features(logits.float()))
    assert gate_features(logits).dtype == torch.float32


def test_an_untrained_gate_lets_nobody_leave():
    for config in (GateConfig([0.1, 1.0]), GateConfig([0.1, 1.0], hidden=8)):
        logits = Gate(config)(torch.rand(5, 4) * 10)
        assert logits.shape == (5, 2)
        assert torch.equal(logits, torch.full((5, 2), -0.1))


def perturbed(config: GateConfig) -> Gate:
    gate = Gate(config)
    with torch.no_grad():
        for place, parameter in enumerate(gate.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)))
    return gate


def test_gates_are_linear_or_have_one_hidden_layer():
    features = torch.rand(6, 4)
    linear = perturbed(GateConfig([0.1, 1.0, 3.0]))
    torch.testing.assert_close(linear(features), features @ linear.output.weight.t() + linear.output.bias)
    deep = perturbed(GateConfig([0.1, 1.0], hidden=8))
    hidden = (features @ deep.inner.weight.t() + deep.inner.bias).clamp(min=0)
    torch.testing.assert_close(deep(features), hidden @ deep.output.weight.t() + deep.output.bias)


def test_the_position_is_a_fifth_input_cut_to_one():
    gate = perturbed(GateConfig([1.0], position_length=10))
    assert gate.output.weight.shape == (1, 5)
    features, index = torch.rand(4, 4), torch.tensor([0, 5, 10, 37])
    position = torch.tensor([0.0, 0.5, 1.0, 1.0])[:, None]
    wanted = torch.cat([features, position], -1) @ gate.output.weight.t() + gate.output.bias
    torch.testing.assert_close(gate(features, index), wanted)
    with pytest.raises(AssertionError, match="need the index"):
        gate(features)


def test_gates_keep_float32_in_models_cast_to_sixteen_bit_and_under_autocast():
    model = MultiExitModel(
        tiny_model(dtype=torch.float32), ExitConfig(layers=[1, 2], gates=GateConfig([1.0], hidden=3))
    )
    model.gates["1"].load_state_dict(perturbed(GateConfig([1.0], hidden=3)).state_dict())
    features = torch.rand(5, 4)
    wanted, before = model.gate(1)(features), {n: p.clone() for n, p in model.gates.named_parameters()}
    for cast in (lambda: model.to(torch.bfloat16), model.half):
        cast()
        assert {p.dtype for p in model.backbone.parameters()} != {torch.float32}
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.gates.named_parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.gate(1)(features), wanted)
    torch.testing.assert_close(model.double().gate(1)(features.double()), wanted.double())
    assert model.gate(1).output.weight.dtype == torch.float64


def test_gates_stand_at_the_exits_below_the_last_block_and_come_with_the_output():
    config = ExitConfig(layers=[1, 3, 4], gates=GateConfig([0.3, 1.0]))
    model = MultiExitModel(tiny_model(), config)
    assert list(model.gates) == ["1", "3"]
    ids = torch.ones(1, 3, dtype=torch.int64)
    assert dict(model(ids).gates) == {1: model.gates["1"], 3: model.gates["3"]}
    assert list(model(ids, exits=[3]).gates) == [3]
    assert len(MultiExitModel(tiny_model(), ExitConfig(layers=[1])).gates) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"cost_weights": []},
            r"exits.gates.cost_weights=\[\]: it is empty.*HINT: Give numbers from 0 to 1000, each once",
        ),
        ({"cost_weights": [0.5, -0.1]}, r"cost_weights=\[0.5, -0.1\]: -0.1 is out of range"),
        ({"cost_weights": [float("nan")]}, r"nan is out of range"),
        ({"cost_weights": [float("inf")]}, r"inf is out of range"),
        ({"cost_weights": [1000.5]}, r"1000.5 is out of range"),
        ({"cost_weights": [1.0, 2.0, 1.0]}, r"1.0 stands there twice"),
        ({"cost_weights": [1.0], "hidden": -1}, r"exits.gates.hidden=-1.*HINT: Set it to 0 for linear gates"),
        ({"cost_weights": [1.0], "position_length": 0}, r"position_length=0.*HINT: Set it to the usual length"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GateConfig(**settings)


@pytest.mark.parametrize("gates", [None, GateConfig([0.3, 1.0]), GateConfig([2.0], hidden=4, position_length=50)])
def test_settings_survive_as_plain_data(gates):
    config = ExitConfig(layers=[1, 2], gates=gates)
    assert ExitConfig.from_dict(config.to_dict()) == config
    assert ("gates" in config.to_dict()) == (gates is not None)


def test_unknown_settings_of_a_checkpoint_are_refused():
    data = {"layers": [1], "gates": {"cost_weights": [1.0], "shape": "round", "depth": 3}}
    with pytest.raises(CheckpointError, match=r"gates have settings this version does not know: depth, shape"):
        ExitConfig.from_dict(data)


def test_names_of_cost_weights_tell_them_apart():
    assert [cost_name(weight) for weight in (0.1, 1, 1.0, 10.0, 0.12345678)] == ["0.1", "1", "1", "10", "0.12345678"]


@pytest.mark.parametrize("depth", [None, 2])
def test_gates_survive_a_checkpoint_folder(tmp_path, depth):
    config = ExitConfig(layers=[1, 3], gates=GateConfig([0.3, 1.0], hidden=3, position_length=8))
    model = MultiExitModel(tiny_model(dtype=torch.float32), config)
    for layer in (1, 3):
        model.gate(layer).load_state_dict(perturbed(config.gates).state_dict())
    model.save_pretrained(tmp_path / "out")
    loaded = MultiExitModel.from_pretrained(tmp_path / "out", depth=depth)
    assert loaded.config.gates == config.gates
    assert list(loaded.gates) == (["1", "3"] if depth is None else ["1"])
    for name, parameter in loaded.gates.named_parameters():
        assert torch.equal(parameter, model.gates.get_parameter(name))
