"""The user's model is used as it is: nothing in it changes, copies are copies, settings fail with a reason."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from eetrain import ExitConfig, MultiExitModel
from eetrain.errors import ConfigError
from eetrain.testing.tiny import FAMILIES, tiny_model

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def snapshot(model) -> dict[str, object]:
    """Everything about a model that a user could notice."""
    return {
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "names": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "forward": {name: "forward" in module.__dict__ for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
def test_the_users_model_is_never_modified(family, head):
    plain = tiny_model(family, dtype=torch.float32)
    before, values = snapshot(plain), copy.deepcopy(plain.state_dict())
    model = MultiExitModel(plain, ExitConfig(layers=[1, 3], head=head))
    assert model.backbone is plain
    assert snapshot(plain) == before, "after attaching"
    model(IDS, MASK, routers=True)
    assert snapshot(plain) == before, "after a forward pass"
    for policy in ("never", "always:1", "threshold:0.045", "threshold:0.045,repair=propagate"):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=4, exit_policy=policy)
        assert snapshot(plain) == before, f"after decoding with {policy}"
    for name, value in plain.state_dict().items():
        assert torch.equal(value, values[name]), name


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        result = model(IDS, MASK)
        return torch.stack([model.logits(result, layer) for layer in (1, 3, None)])


def scale_weights(model, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("head", ["norm", "block"])
def test_a_deep_copy_runs_its_own_weights(family, head):
    model = MultiExitModel(tiny_model(family, dtype=torch.float32), ExitConfig(layers=[1, 3], head=head))
    want = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), want)
    scale_weights(twin, 0.5)
    assert torch.equal(logits(model), want)
    changed = logits(twin)
    assert not torch.allclose(changed, want, atol=1e-3)
    scale_weights(model, 0.0)
    assert torch.equal(logits(twin), changed)
    new = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(twin.generate(IDS, **new), twin.causal_lm.generate(IDS, **new))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_pickle_round_trip(family):
    model = MultiExitModel(tiny_model(family, dtype=torch.float32), ExitConfig(layers=[1, 3], head="mlp")).eval()
    model.generate(IDS, max_new_tokens=2, exit_policy="threshold:0.045")
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(restored), logits(model))
    assert restored.anatomy == model.anatomy
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), logits(model))


def test_names_in_the_state_dict():
    model = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[3, 1], output="own"))
    assert model.exit_layers == (1, 3)
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "exits"}
    assert [name for name in model.state_dict() if name.startswith("exits.")] == [
        "exits.1.norm.weight",
        "exits.1.output.weight",
        "exits.3.norm.weight",
        "exits.3.output.weight",
    ]
    assert model.num_blocks == 4
    assert model.device == torch.device("cpu")
    assert model.causal_lm is model.backbone


def test_no_exits_at_all_is_a_plain_decoder():
    model = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[]))
    with torch.no_grad():
        assert torch.equal(model.logits(model(IDS)), model.backbone(IDS).logits)


def test_a_partly_loaded_backbone_has_no_full_depth():
    plain = tiny_model("llama")
    plain.config.eetrain_full_depth = 8
    model = MultiExitModel(plain, ExitConfig(layers=[2], head="norm"))
    with pytest.raises(
        ConfigError, match=r"the full depth was asked for, but only blocks 1..4 .* were loaded"
    ) as caught:
        model(IDS)
    assert "depth=None" in caught.value.hint
    assert model(IDS, full_depth=False).full_features is None
    with pytest.raises(ConfigError, match=r"Exit policy never runs the full depth, but only blocks 1..4 were loaded"):
        model.generate(IDS)
    assert model.generate(IDS, max_new_tokens=2, exit_policy="always:2").shape == (2, 14)
    with pytest.raises(ConfigError, match="head=block copies the last block, but only the first blocks were loaded"):
        MultiExitModel(plain, ExitConfig(layers=[2], head="block"))


def test_an_output_asks_for_exits_it_has():
    model = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[1, 3]))
    with pytest.raises(ConfigError, match=r"forward\(exits=\[2\]\): the model has no exit after block 2") as caught:
        model(IDS, exits=[2])
    assert caught.value.hint == "Exits stand after blocks 1, 3."
