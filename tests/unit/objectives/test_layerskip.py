"""LayerSkip on a model: plain training as its limit, brute force otherwise, and nothing computed that is off."""

import copy

import pytest
import torch
from torch.nn import functional as F

from eetrain.errors import ConfigError
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.objectives import FULL, LayerDropout, LayerSkip, MultiExitCrossEntropy
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule


def batch(rows=3, length=9, seed=0):
    ids = torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
    real = torch.arange(length) < torch.tensor([length, 5, 7])[:rows, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~real, -100), "attention_mask": real.long()}


def module_of(objective, layers=(1, 2, 3), head="tied", tuning="full", **settings):
    torch.manual_seed(0)
    model = MultiExitModel(tiny_model(num_hidden_layers=4), ExitConfig(layers=list(layers), head=head))
    return EarlyExitModule.from_model(model, objective, tuning=tuning, **settings)


def loss_and_gradients(module, data, step=0):
    module._step = lambda: step
    module.zero_grad()
    torch.manual_seed(5)
    result = module.compute_loss(data)
    result.total.backward()
    return result, {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "objective",
    [
        LayerSkip(exit_scale=0.0),
        LayerSkip("torchtune", 0.0, "rotational", 2),
        LayerSkip("uniform", 0.0, dropout=LayerDropout(0.0)),
        # At step 1 of 50 no exit has come to its turn.
        LayerSkip("uniform", 1.0, "gradual", curriculum_steps=50),
    ],
)
def test_without_exits_and_dropout_it_is_plain_training_to_the_bit(objective):
    found, gradients = loss_and_gradients(module_of(objective), batch(), 1)
    wanted, others = loss_and_gradients(module_of(MultiExitCrossEntropy(), layers=()), batch(), 1)
    assert torch.equal(found.total, wanted.total)
    assert gradients.keys() == others.keys()
    for name, grad in others.items():
        assert torch.equal(gradients[name], grad), name


def by_brute_force(model, data, runs_LB, weights):
    """The weighted sum, every row and block by itself: plain modules of transformers, none of ours."""
    inner = model.causal_lm.model
    sums, count = dict.fromkeys(weights, 0.0), 0
    for row, ids_T in enumerate(data["input_ids"]):
        length = int(data["attention_mask"][row].sum())
        ids_1T = ids_T[None, :length]
        state = inner.embed_tokens(ids_1T)
        positions = torch.arange(length)[None]
        rotary = inner.rotary_emb(state, positions)
        bias = torch.full((length, length), -torch.inf, dtype=state.dtype).triu(1)[None, None]
        count += length - 1
        for block in range(1, 5):
            if runs_LB[block - 1, row]:
                state = inner.layers[block - 1](
                    state, attention_mask=bias, position_embeddings=rotary, position_ids=positions
                )
            depth = FULL if block == 4 else block
            if depth in weights:
                logits = model.causal_lm.lm_head(inner.norm(state))[0, :-1]
                sums[depth] = sums[depth] + F.cross_entropy(logits, ids_1T[0, 1:], reduction="sum")
    return sum(weights[depth] * total / count for depth, total in sums.items())


@pytest.mark.parametrize("step", [0, 1, 2])
def test_loss_and_gradients_under_dropout_are_those_of_brute_force(step):
    """Weights by hand: e(l) = 0.5 sum_{i<=l} i gives 0, 0.5, 1.5, and 3 + 0.5 * 3 for the full depth."""
    objective = LayerSkip("sum", 0.5, "rotational", 2, dropout=LayerDropout(0.6, "uniform"))
    module = module_of(objective)
    found, gradients = loss_and_gradients(module, batch(), step)
    torch.manual_seed(5)
    runs_LB = objective.active_blocks(batch()["labels"], step=step)[..., 0]
    assert not runs_LB.any(1).all(), "some block runs in no row"
    assert runs_LB.any()
    weights = {FULL: 4.5 / 6, 3: 1.5 / 6} if step % 2 == 0 else {FULL: 4.5 / 5, 2: 0.5 / 5}
    model = copy.deepcopy(module.model)
    model.zero_grad()
    wanted = by_brute_force(model, batch(), runs_LB, weights)
    wanted.backward()
    torch.testing.assert_close(found.total, wanted, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        mine, theirs = gradients[f"model.{name}"], parameter.grad
        assert mine is not None, "what no row reaches has a gradient of zero"
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=0, atol=1e-12)


def test_the_terms_are_those_of_the_exits_that_are_on():
    module = module_of(LayerSkip("uniform", 0.5, "rotational", 3))
    for step in range(4):
        result, _ = loss_and_gradients(module, batch(), step)
        layer = step % 3 + 1
        assert result.terms.keys() == {f"ce/exit_{layer}", "ce/full", f"weight/exit_{layer}"}
        wanted = (0.5 * result.terms[f"ce/exit_{layer}"] + result.terms["ce/full"]) / 1.5
        torch.testing.assert_close(result.total.detach(), wanted)


@pytest.mark.parametrize("head", ["norm", "mlp"])
def test_exits_that_are_off_are_not_computed_and_have_gradients_of_zero(head):
    module = module_of(LayerSkip("uniform", 1.0, "rotational", 3), head=head)
    seen = []
    for layer in (1, 2, 3):
        hook = lambda _, args, layer=layer: seen.append((layer, args[0].shape[:2].numel()))  # noqa: E731
        module.model.head(layer).register_forward_pre_hook(hook)
    for step in range(3):
        seen.clear()
        _, gradients = loss_and_gradients(module, batch(), step)
        assert dict(seen) == {layer: 27 if layer == step + 1 else 1 for layer in (1, 2, 3)}
        for name, grad in gradients.items():
            off = name.startswith("model.exits.") and not name.startswith(f"model.exits.{step + 1}.")
            assert bool(grad.any()) != off, name


def test_validation_sees_every_exit_and_every_block():
    objective = LayerSkip("uniform", 1.0, "rotational", 3, dropout=LayerDropout(1.0, "uniform"))
    module, plain = module_of(objective), module_of(MultiExitCrossEntropy())
    for each in (module, plain):
        each.eval()
        with torch.no_grad():
            each.validation_step(batch(), 0)
    wanted = plain.metrics["val"].compute()
    assert {"nll/exit_1", "nll/exit_2", "nll/exit_3", "nll/full"} <= wanted.keys()
    assert module.metrics["val"].compute() == wanted


def test_adapters_learn_under_dropout():
    dropout = LayerDropout(0.6, "uniform")
    module = module_of(LayerSkip("uniform", dropout=dropout), tuning="lora")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    _, gradients = loss_and_gradients(module, batch())
    torch.manual_seed(5)
    runs_L = module.objective.active_blocks(batch()["labels"], step=0).any(-1).any(-1).tolist()
    assert len(set(runs_L)) == 2
    for name, grad in gradients.items():
        if "lora_" in name:
            block = int(name.split("layers.")[1].split(".")[0])
            assert bool(grad.any()) == runs_L[block], name


def test_a_frozen_backbone_trains_its_exits_and_steps_without_any_are_no_hindrance():
    module = module_of(LayerSkip("uniform", 1.0, "rotational", 5), head="mlp", tuning="frozen")
    for step in range(5):
        _, gradients = loss_and_gradients(module, batch(), step)
        assert gradients
        for name, grad in gradients.items():
            assert bool(grad.any()) == name.startswith(f"model.exits.{step + 1}."), name


def test_dropout_in_a_frozen_backbone_is_refused():
    with pytest.raises(ConfigError) as caught:
        module_of(LayerSkip(dropout=LayerDropout(0.1)), head="norm", tuning="frozen")
    assert str(caught.value) == (
        "The objective LayerSkip drops blocks, but with model.tuning=frozen none of them learns from it. HINT: Leave "
        "dropout out of the objective, or set model.tuning=full or lora."
    )


def test_lists_of_the_user_stay_as_they_are():
    layers, blocks = [3, 1, 2], [4, 2]
    objective = LayerSkip("uniform", 1.0, "rotational", 2, dropout=LayerDropout(0.5, "uniform", blocks=blocks))
    objective.bind(layers, 4)
    for step in range(4):
        objective.depth_weights(step)
        objective.active_blocks(batch()["labels"], step=step)
    assert (layers, blocks) == ([3, 1, 2], [4, 2])
