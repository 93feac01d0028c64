"""Objectives with distillation on a tiny decoder with exits: the formula, its terms, and what stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.objectives import Distillation, EETuning, LayerSkip, MultiExitCrossEntropy
from eetrain.testing.tiny import tiny_model

LAYERS, BLOCKS, VOCABULARY = (1, 3), 4, 61


def model_of(head="mlp", family="llama", **exits):
    torch.manual_seed(0)
    model = MultiExitModel(tiny_model(family, dtype=torch.float64), ExitConfig(layers=list(LAYERS), head=head, **exits))
    assert model.num_blocks == BLOCKS
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch():
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, VOCABULARY, (3, 8), generator=draw)
    labels_BT = ids_BT.clone()
    labels_BT[0, :3] = -100
    labels_BT[1, 5:] = -100
    return ids_BT, labels_BT


def bound(objective):
    objective.bind(LAYERS, BLOCKS)
    return objective


def wanted_of(model, ids_BT, labels_BT, share, weights, full_weight):
    """The sum from logits of all depths, and each exit's divergence."""
    output = model(ids_BT)
    kept = labels_BT[:, 1:] != -100
    labels_N = labels_BT[:, 1:][kept]
    target_NV = model.logits(output).detach()[:, :-1][kept].softmax(-1)
    total, divergences = 0.0, {}
    for layer, weight in zip(LAYERS, weights, strict=True):
        log_probs_NV = model.logits(output, layer)[:, :-1][kept].log_softmax(-1)
        soft = -(target_NV * log_probs_NV).sum(-1).mean()
        total = total + weight * ((1 - share) * F.nll_loss(log_probs_NV, labels_N) + share * soft)
        divergences[layer] = (target_NV * (target_NV.log() - log_probs_NV)).sum(-1).mean().item()
    plain = F.cross_entropy(model.logits(output)[:, :-1][kept], labels_N)
    return total + full_weight * plain, divergences


def gradients(total, model):
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("output", ["tied", "own"])
def test_everything_learns_and_the_full_depth_by_its_labels_only(share, output):
    model, (ids_BT, labels_BT) = model_of(output=output), batch()
    total, divergences = wanted_of(model, ids_BT, labels_BT, share, (0.5, 2.0), 0.7)
    wanted = gradients(total, model)
    objective = bound(MultiExitCrossEntropy([0.5, 2.0], full_weight=0.7, distillation=Distillation(share)))
    result = objective(model(ids_BT), labels_BT, step=0)
    torch.testing.assert_close(result.total, total, rtol=1e-10, atol=1e-12)
    found = gradients(result.total, model)
    assert found.keys() == wanted.keys() > {"backbone.lm_head.weight"}
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)
    for layer, divergence in divergences.items():
        assert result.terms[f"distill/exit_{layer}"].item() == pytest.approx(divergence, rel=1e-10)
    assert {name for name in result.terms if name.startswith("distill/")} == {"distill/exit_1", "distill/exit_3"}
    assert not any(term.requires_grad for term in result.terms.values())


def test_layerskip_distils_the_exits_that_are_on():
    """Step 0 has exit 1 on, step 1 exit 3; weights 2 : 1 of the full depth make shares of 2/3 and 1/3."""
    model, (ids_BT, labels_BT) = model_of(), batch()
    objective = bound(LayerSkip("uniform", 2.0, "rotational", 2, distillation=Distillation(0.4)))
    for step, weights in ((0, (2 / 3, 0.0)), (1, (0.0, 2 / 3))):
        total, divergences = wanted_of(model, ids_BT, labels_BT, 0.4, weights, 1 / 3)
        result = objective(model(ids_BT), labels_BT, step=step)
        torch.testing.assert_close(result.total, total, rtol=1e-10, atol=1e-12)
        layer = LAYERS[step]
        assert result.terms[f"distill/exit_{layer}"].item() == pytest.approx(divergences[layer], rel=1e-10)


@pytest.mark.parametrize("head", ["mlp", "block", "norm"])
@pytest.mark.parametrize("statistics", [False, True])
def test_self_supervised_heads_leave_a_frozen_backbone_alone(head, statistics):
    model, (ids_BT, labels_BT) = model_of(head), batch()
    model.backbone.requires_grad_(False)
    before = {name: p.clone() for name, p in model.backbone.named_parameters()}
    total, divergences = wanted_of(model, ids_BT, labels_BT, 1.0, (0.5, 2.0), 0.0)
    wanted = gradients(total, model)
    objective = bound(EETuning([0.5, 2.0], distillation=Distillation()))
    assert objective.needs_full_depth()
    assert not bound(EETuning()).needs_full_depth()
    result = objective(model(ids_BT), labels_BT, step=0, statistics=statistics)
    assert result.layers == LAYERS
    torch.testing.assert_close(result.total, total.detach(), rtol=1e-10, atol=1e-12, check_dtype=False)
    found = gradients(result.total, model)
    assert found.keys() == wanted.keys()
    assert all(name.startswith("exits.") for name in found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)
    assert result.terms["distill/exit_3"].item() == pytest.approx(divergences[3], rel=1e-10)
    torch.optim.SGD(model.exits.parameters(), lr=1.0).step()
    assert all(torch.equal(p, before[name]) for name, p in model.backbone.named_parameters())


def test_scrambled_labels_teach_the_same_and_moved_ones_do_not():
    model, (ids_BT, labels_BT) = model_of(), batch()
    model.backbone.requires_grad_(False)
    objective = bound(EETuning(distillation=Distillation()))
    scrambled_BT = torch.where(labels_BT == -100, -100, (labels_BT + 5) % VOCABULARY)
    plain, scrambled, moved = (
        gradients(objective(model(ids_BT), these, step=0).total, model)
        for these in (labels_BT, scrambled_BT, labels_BT.roll(1, dims=1))
    )
    assert all(torch.equal(grad, scrambled[name]) for name, grad in plain.items())
    assert not all(torch.equal(grad, moved[name]) for name, grad in plain.items())


def test_an_exit_that_equals_the_full_depth_has_no_distance_and_nothing_to_learn():
    """The exit after the last block with the backbone's own tail."""
    model = MultiExitModel(tiny_model("gemma2", dtype=torch.float64), ExitConfig(layers=[1, BLOCKS], head="tied"))
    ids_BT, labels_BT = batch()
    objective = MultiExitCrossEntropy({1: 0.0, BLOCKS: 1.0}, full_weight=1e-9, distillation=Distillation())
    objective.bind([1, BLOCKS], BLOCKS)
    result = objective(model(ids_BT), labels_BT, step=0)
    assert abs(result.terms[f"distill/exit_{BLOCKS}"].item()) < 1e-12
    assert result.terms["distill/exit_1"] > 1e-3
    largest = max(grad.abs().max().item() for grad in gradients(result.total, model).values())
    assert 0 < largest < 1e-8, "of the plain loss alone, times its weight"


def test_without_distillation_there_is_no_such_term():
    model, (ids_BT, labels_BT) = model_of(), batch()
    result = bound(MultiExitCrossEntropy())(model(ids_BT), labels_BT, step=0)
    assert not any(name.startswith("distill/") for name in result.terms)
