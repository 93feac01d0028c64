"""Joint gating on a tiny Llama in float64, against the formulas computed from full logits with plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from eetrain import ExitConfig, MultiExitModel
from eetrain.errors import ConfigError
from eetrain.exits import GateConfig
from eetrain.exits.gating import exit_distribution
from eetrain.objectives import FULL, JointGating
from eetrain.testing.tiny import tiny_model

LAYERS, BLOCKS, WEIGHTS = (1, 3), 4, (0.2, 1.0, 4.0)
WARMUP, GATES, EXITS = 0, 2, 5
"""A step of each phase under ``objective()``."""


def model_of(position_length=None, hidden=0, output="own"):
    gates = GateConfig(list(WEIGHTS), hidden=hidden, position_length=position_length)
    config = ExitConfig(layers=list(LAYERS), head="norm", output=output, gates=gates)
    model = MultiExitModel(tiny_model(), config).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*model.exits.parameters(), *model.gates.parameters()]:
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def objective(**settings):
    bound = JointGating(**{"warmup_steps": 2, "phase_steps": 3, **settings})
    bound.bind(LAYERS, BLOCKS)
    bound.bind_gates(WEIGHTS)
    return bound


def batch(seed=0):
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 6:] = -100
    return ids, labels


def logits_of(model, ids):
    out = model(ids)
    return [model.logits(out, layer)[:, :-1].flatten(0, 1) for layer in (*LAYERS, None)]


def plain(model, ids, labels):
    """Losses ``[E, N]`` and gate logits ``[N, K, G]`` of the tokens with a label, from full logits."""
    target = labels[:, 1:].flatten()
    valid = target != -100
    losses, gates = [], []
    for layer, logits in zip((*LAYERS, FULL), logits_of(model, ids), strict=True):
        logits = logits[valid]
        losses.append(F.cross_entropy(logits, target[valid], reduction="none"))
        if layer == FULL:
            continue
        probs = logits.detach().softmax(-1)
        sharp = probs.square() / probs.square().sum(-1, keepdim=True)
        top = probs.topk(2).values
        features = [top[:, 0], -(probs * probs.log()).sum(-1), top[:, 0] - top[:, 1], -(sharp * sharp.log()).sum(-1)]
        index = torch.stack([(row != -100).cumsum(0) - 1 for row in labels[:, 1:]]).flatten()[valid]
        gates.append(model.gate(layer)(torch.stack(features, -1), index))
    return torch.stack(losses), torch.stack(gates, -1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        other = torch.zeros_like(grad) if wanted[name] is None and grad is not None else wanted[name]
        grad = torch.zeros_like(other) if grad is None and other is not None else grad
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("step", "phase"),
    [(0, "warmup"), (1, "warmup"), (2, "gates"), (4, "gates"), (5, "exits"), (7, "exits"), (8, "gates"), (11, "exits")],
)
def test_phases_are_a_function_of_the_step(step, phase):
    assert objective().phase(step) == phase
    assert objective().trains_model_at(step) == (phase != "gates")
    model, (ids, labels) = model_of(), batch()
    number = {"warmup": 0.0, "gates": 1.0, "exits": 2.0}[phase]
    assert objective()(model(ids), labels, step=step).terms["phase"].item() == number


def test_the_warmup_counts_shallow_exits_more():
    model, (ids, labels) = model_of(), batch()
    losses, _ = plain(model, ids, labels)
    wanted = 3 * losses[0].mean() + 2 * losses[1].mean() + losses[2].mean()
    out = objective()(model(ids), labels, step=WARMUP)
    torch.testing.assert_close(out.total, wanted, rtol=1e-12, atol=0)
    assert_same(gradients(model, objective()(model(ids), labels, step=WARMUP).total), gradients(model, wanted))
    assert (out.terms["weight/exit_1"].item(), out.terms["weight/exit_3"].item()) == (3.0, 2.0)


@pytest.mark.parametrize("settings", [{}, {"position_length": 4}, {"hidden": 3, "output": "tied"}])
def test_exits_learn_under_the_mean_distribution_of_all_cost_weights(settings):
    model, (ids, labels) = model_of(**settings), batch()
    losses, gates = plain(model, ids, labels)
    shares = exit_distribution(gates.detach().sigmoid()).mean(1).t()
    assert ((shares > 0.01) & (shares < 0.99)).any(-1).all(), "every depth counts for some token"
    weighted = (shares * losses).sum(0).mean()
    wanted = weighted * (losses.mean(1).sum() / weighted).detach()
    out = objective()(model(ids), labels, step=EXITS)
    torch.testing.assert_close(out.total, losses.mean(1).sum(), rtol=1e-12, atol=0)
    found, autograd = gradients(model, out.total), gradients(model, wanted)
    assert_same(found, autograd)
    assert all(grad is None for name, grad in found.items() if name.startswith("gates."))
    for row, name in enumerate(("ce/exit_1", "ce/exit_3", "ce/full")):
        torch.testing.assert_close(out.terms[name], losses[row].mean().detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("small_chunks", [1, 2, 5])
def test_the_weights_do_not_depend_on_the_chunks(monkeypatch, small_chunks):
    from eetrain.objectives import linear_ce

    model, (ids, labels) = model_of(position_length=4), batch()
    whole = objective()(model(ids), labels, step=EXITS).total
    wanted = gradients(model, whole)
    monkeypatch.setattr(linear_ce, "_default_chunk", lambda weight: small_chunks)
    assert_same(gradients(model, objective()(model(ids), labels, step=EXITS).total), wanted)


def test_when_nobody_leaves_only_the_full_depth_learns():
    model, (ids, labels) = model_of(output="own"), batch()
    for gate in model.gates.values():
        torch.nn.init.zeros_(gate.output.weight)
        torch.nn.init.constant_(gate.output.bias, -1e6)
    out = objective()(model(ids), labels, step=EXITS)
    found = gradients(model, out.total)
    losses, _ = plain(model, ids, labels)
    full = losses[2].mean()
    wanted = gradients(model, full * (losses.mean(1).sum() / full).detach())
    assert_same(found, wanted)
    assert all(not grad.any() for name, grad in found.items() if name.startswith("exits."))
    assert found["backbone.lm_head.weight"].any()


@pytest.mark.parametrize("settings", [{}, {"position_length": 4, "hidden": 3}])
@pytest.mark.parametrize("costs", ["blocks", {1: 0.4, 3: 0.9}])
@pytest.mark.parametrize("balance", [True, False])
def test_gates_learn_the_cheapest_exit_of_every_token(settings, costs, balance):
    model, (ids, labels) = model_of(**settings), batch()
    losses, gates = plain(model, ids, labels)
    c = [0.25, 0.75, 1.0] if costs == "blocks" else [0.4, 0.9, 1.0]
    wanted, places = 0.0, []
    for k, weight in enumerate(WEIGHTS):
        best = (losses.detach() + weight * torch.tensor(c).double()[:, None]).argmin(0)
        places.append(best)
        for gate in range(2):
            y = (gate >= best).double()
            both = 0 < y.sum() < len(y)
            positive = (len(y) - y.sum()) / y.sum() if balance and both else torch.tensor(1.0)
            terms = -(positive * y * F.logsigmoid(gates[:, k, gate]) + (1 - y) * F.logsigmoid(-gates[:, k, gate]))
            wanted = wanted + terms.mean() / 6
    assert len(torch.stack(places).unique()) == 3, "every depth is the best for some token"
    bound = objective(exit_costs=costs, class_balance=balance)
    with torch.no_grad():
        features = model(ids)
    out = bound(features, labels, step=GATES)
    torch.testing.assert_close(out.total, wanted, rtol=1e-12, atol=0)
    found, autograd = gradients(model, out.total), gradients(model, wanted)
    assert_same(found, autograd)
    assert {name.split(".")[0] for name, grad in found.items() if grad is not None} == {"gates"}
    blocks = torch.tensor([1.0, 3.0, 4.0])
    for name, best, leave in zip(("0.2", "1", "4"), places, (gates >= 0).unbind(1), strict=True):
        depth = blocks[torch.cat([leave, torch.ones_like(leave[:, :1])], -1).int().argmax(-1)].mean()
        assert out.terms[f"gate/{name}/optimal_depth"].item() == pytest.approx(blocks[best].mean().item())
        assert out.terms[f"gate/{name}/depth"].item() == pytest.approx(depth.item())
    assert out.terms["gate_bce"].item() == out.total.item()
    torch.testing.assert_close(out.terms["ce/full"], losses[2].mean().detach(), rtol=1e-12, atol=0)
    assert not any(term.requires_grad for term in out.terms.values())


@pytest.mark.parametrize("step", [WARMUP, GATES, EXITS])
def test_a_batch_without_labels_gives_nothing_to_learn(step):
    model, (ids, labels) = model_of(), batch()
    out = objective()(model(ids), torch.full_like(labels, -100), step=step)
    found = gradients(model, out.total)
    assert out.total.item() == 0.0
    assert all(term.isfinite() for term in out.terms.values())
    assert all(grad is None or not grad.any() for grad in found.values())


@pytest.mark.parametrize("step", [WARMUP, GATES, EXITS])
def test_statistics_come_when_asked_for(step):
    model, (ids, labels) = model_of(), batch()
    assert objective()(model(ids), labels, step=step).statistics is None
    out = objective()(model(ids), labels, step=step, statistics=True)
    valid = F.pad(labels[:, 1:], (0, 1), value=-100).flatten() != -100
    target = labels[:, 1:].flatten()
    assert out.layers == (*LAYERS, FULL)
    for row, logits in enumerate(logits_of(model, ids)):
        assert torch.equal(out.statistics.prediction[row, valid], logits[target != -100].argmax(-1))


@pytest.mark.parametrize(
    ("layers", "settings", "message"),
    [
        ((), {}, r"JointGating needs exits below the last of 4 blocks and none after it; exits are at layers \[\]"),
        ((1, 4), {}, r"exits are at layers \[1, 4\].*HINT: Set model.exits.layers to blocks below the last"),
        ((1, 3), {"exit_costs": {1: 0.5}}, r"exit_costs names layers \[1\]; the model's exits are at layers \[1, 3\]"),
        ((1, 3), {"exit_costs": {1: 0.5, 3: 0.4}}, "rise with depth"),
    ],
)
def test_exits_that_do_not_fit_are_refused(layers, settings, message):
    with pytest.raises(ConfigError, match=message):
        JointGating(**settings).bind(layers, BLOCKS)


def test_a_model_without_gates_is_refused():
    with pytest.raises(
        ConfigError, match=r"trains gates, and the model has none.*HINT: Set model.exits.gates.cost_wei"
    ):
        JointGating().bind_gates(())


@pytest.mark.parametrize("settings", [{"warmup_steps": -1}, {"phase_steps": 0}])
def test_steps_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=r"JointGating has warmup_steps=.*HINT: warmup_steps is 0 or more"):
        JointGating(**settings)


def test_a_run_that_ends_before_the_gates_had_their_turn_is_refused():
    bound = objective()
    bound.prepare_run(5)
    bound.prepare_run(float("inf"))
    with pytest.raises(
        ConfigError, match=r"gates in steps 2 to 5 first, but the run ends after 4.*HINT: Set warmup_st"
    ):
        bound.prepare_run(4)


def test_one_trade_off_is_a_policy_to_decode_with():
    bound = objective()
    assert bound.exit_policy() is None
    bound.bind_gates([0.3])
    assert bound.exit_policy() == "gate:0.5"
