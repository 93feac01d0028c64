"""Objectives on a real tiny Llama whose intermediate states pass through norms of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from eetrain.backbones.projection import Projection
from eetrain.errors import ConfigError
from eetrain.objectives import FULL, Distillation, EETuning, MultiExitCrossEntropy, score

VOCABULARY, WIDTH, BLOCKS, LAYERS = 29, 12, 4, (1, 3)


@dataclass(frozen=True)
class Features:
    features: Mapping[int, Tensor]
    full_features: Tensor | None
    projections: Mapping[int, Projection]
    full_projection: Projection
    router_loss: Tensor | None = None


class TinyExits(nn.Module):
    """A Llama with a norm, and if untied a matrix, per exit."""

    def __init__(self, tied: bool = True, layers=LAYERS):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        self.backbone = LlamaForCausalLM(config)
        self.layers = layers
        self.norms = nn.ModuleDict({str(layer): nn.RMSNorm(WIDTH) for layer in LAYERS})
        self.matrices = nn.ModuleDict({str(n): nn.Linear(WIDTH, VOCABULARY, bias=False) for n in LAYERS})
        self.tied = tied

    def matrix(self, layer):
        return self.backbone.lm_head.weight if self.tied else self.matrices[str(layer)].weight

    def forward(self, ids, *, full=True, frozen=False, router_loss=None):
        with torch.set_grad_enabled(not frozen):
            output = self.backbone.model(ids, output_hidden_states=True)
        return Features(
            {n: self.norms[str(n)](output.hidden_states[n]) for n in reversed(self.layers)},
            output.last_hidden_state if full else None,
            {n: Projection(self.matrix(n)) for n in self.layers},
            Projection(self.backbone.lm_head.weight),
            router_loss,
        )


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (3, 8), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 5:] = -100
    return ids, labels


def logits_of(model, ids):
    out = model(ids)
    exits = {n: out.projections[n](out.features[n]) for n in LAYERS}
    return {**exits, FULL: out.full_projection(out.full_features)}


def hf_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def bound(objective, layers=LAYERS):
    objective.bind(layers, BLOCKS)
    return objective


def grads_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(grads, wanted):
    for name, grad in grads.items():
        other = wanted[name]
        if grad is None or other is None:
            present = grad if other is None else other
            assert present is None or present.count_nonzero() == 0, name
        else:
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tied", [True, False])
def test_weighted_sum_of_transformers_losses(tied):
    model = TinyExits(tied)
    ids, labels = batch()
    logits = logits_of(model, ids)
    wanted = 0.3 * hf_loss(logits[1], labels) + 0.6 * hf_loss(logits[3], labels) + 0.9 * hf_loss(logits[FULL], labels)
    wanted_grads = grads_of(wanted, model)
    objective = bound(MultiExitCrossEntropy(weights={3: 0.6, 1: 0.3}, full_weight=0.9), layers=(3, 1))
    out = objective(model(ids), labels, step=0)
    torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=1e-6)
    assert_same_gradients(grads_of(out.total, model), wanted_grads)
    for layer, name in ((1, "ce/exit_1"), (3, "ce/exit_3"), (FULL, "ce/full")):
        torch.testing.assert_close(out.terms[name], hf_loss(logits[layer], labels).detach(), rtol=1e-6, atol=1e-6)
    assert out.terms["weight/exit_1"].item() == pytest.approx(0.3)
    assert set(out.terms) == {"ce/exit_1", "ce/exit_3", "ce/full", "weight/exit_1", "weight/exit_3"}
    assert not any(term.requires_grad for term in out.terms.values())
    assert out.layers == (1, 3, FULL)


@pytest.mark.parametrize("hot", [1, 3, FULL])
def test_one_hot_weights_are_the_loss_of_that_depth(hot):
    model = TinyExits()
    ids, labels = batch()
    wanted = hf_loss(logits_of(model, ids)[hot], labels)
    if hot == FULL:
        torch.testing.assert_close(wanted, model.backbone(ids, labels=labels).loss, rtol=1e-6, atol=1e-6)
    weights = {layer: float(layer == hot) for layer in LAYERS}
    objective = bound(MultiExitCrossEntropy(weights=weights, full_weight=float(hot == FULL)))
    out = objective(model(ids), labels, step=0)
    torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=1e-6)
    assert_same_gradients(grads_of(out.total, model), grads_of(hf_loss(logits_of(model, ids)[hot], labels), model))


def test_without_exits_it_is_the_plain_language_model():
    model = TinyExits(layers=())
    ids, labels = batch()
    objective = bound(MultiExitCrossEntropy(), layers=())
    out = objective(model(ids), labels, step=0)
    wanted = model.backbone(ids, labels=labels).loss
    torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=1e-6)
    assert_same_gradients(grads_of(out.total, model), grads_of(model.backbone(ids, labels=labels).loss, model))
    assert set(out.terms) == {"ce/full"}


def test_exits_of_weight_zero_leave_training_bit_equal_to_plain_training():
    ids, labels = batch()
    trained = []
    for layers, weights in (((), 1.0), (LAYERS, 0.0)):
        model = TinyExits(tied=False, layers=layers)
        objective = bound(MultiExitCrossEntropy(weights=weights), layers=layers)
        optimizer = torch.optim.AdamW(model.backbone.parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            objective(model(ids), labels, step=step).total.backward()
            optimizer.step()
        trained.append(model.backbone.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_schedule_follows_the_step_and_not_the_calls():
    model = TinyExits()
    ids, labels = batch()
    settings = {"weights": 1.0, "schedule": "linear", "schedule_steps": 4, "initial_weights": [0.0, 2.0]}
    objective = bound(MultiExitCrossEntropy(**settings))
    ce = objective(model(ids), labels, step=0).terms
    for step, (low, high) in ((0, (0.0, 2.0)), (3, (0.75, 1.25)), (1, (0.25, 1.75)), (9, (1.0, 1.0))):
        out = objective(model(ids), labels, step=step)
        wanted = low * ce["ce/exit_1"] + high * ce["ce/exit_3"] + ce["ce/full"]
        torch.testing.assert_close(out.total.detach(), wanted, rtol=1e-6, atol=1e-6)
        assert (out.terms["weight/exit_1"].item(), out.terms["weight/exit_3"].item()) == (low, high)
    resumed = bound(MultiExitCrossEntropy(**settings))
    assert torch.equal(resumed(model(ids), labels, step=3).total, objective(model(ids), labels, step=3).total)


@pytest.mark.parametrize("objective", [MultiExitCrossEntropy(), EETuning()])
def test_the_router_loss_is_added_once(objective):
    model = TinyExits()
    ids, labels = batch()
    bound(objective)
    plain = objective(model(ids), labels, step=0)
    router = torch.tensor(0.25, requires_grad=True)
    out = objective(model(ids, router_loss=router), labels, step=0)
    torch.testing.assert_close(out.total, plain.total + 0.25)
    assert out.terms["router"].item() == 0.25
    out.total.backward()
    assert router.grad.item() == 1.0


@pytest.mark.parametrize("confident", [False, True])
def test_ee_tuning_is_each_exits_own_loss_and_leaves_the_backbone_alone(confident):
    model = TinyExits(tied=False)
    ids, labels = batch()
    logits = logits_of(model, ids)
    target = labels[:, 1:].flatten()
    wanted = 0
    for layer, weight in ((1, 0.5), (3, 2.0)):
        flat = logits[layer][:, :-1].flatten(0, 1)
        nll = F.cross_entropy(flat, target, reduction="none", ignore_index=-100)
        trust = flat.softmax(-1).max(-1).values.detach() if confident else torch.ones_like(nll)
        wanted = wanted + weight * (trust * nll)[target != -100].mean()
    wanted_grads = grads_of(wanted, model)
    objective = bound(EETuning(weights=[0.5, 2.0], confidence_weights=confident))
    assert objective.freezes_backbone
    assert not objective.needs_full_depth()
    out = objective(model(ids, full=False, frozen=True), labels, step=0)
    torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.terms["ce/exit_3"], hf_loss(logits[3], labels).detach(), rtol=1e-6, atol=1e-6)
    assert "ce/full" not in out.terms
    grads = grads_of(out.total, model)
    heads = {n: g for n, g in grads.items() if not n.startswith("backbone.")}
    assert len(heads) == 4
    assert all(g is None for n, g in grads.items() if n.startswith("backbone."))
    assert_same_gradients(heads, wanted_grads)


@pytest.mark.parametrize("confident", [False, True])
def test_exits_trained_together_equal_exits_trained_alone(confident):
    trained = {}
    for layers in (LAYERS, (1,), (3,)):
        model = TinyExits(tied=False, layers=layers)
        objective = bound(EETuning(confidence_weights=confident), layers=layers)
        optimizer = torch.optim.Adam([*model.norms.parameters(), *model.matrices.parameters()], lr=1e-2)
        for step in range(3):
            ids, labels = batch(step)
            optimizer.zero_grad()
            objective(model(ids, full=False, frozen=True), labels, step=step).total.backward()
            optimizer.step()
        trained[layers] = model
    for layer in LAYERS:
        for part in ("norms", "matrices"):
            together = getattr(trained[LAYERS], part)[str(layer)].weight
            alone = getattr(trained[(layer,)], part)[str(layer)].weight
            torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_statistics_come_when_asked_for():
    model = TinyExits()
    ids, labels = batch()
    objective = bound(MultiExitCrossEntropy())
    assert objective(model(ids), labels, step=0).statistics is None
    out = objective(model(ids), labels, step=0, statistics=True)
    logits = logits_of(model, ids)
    valid = F.pad(labels[:, 1:], (0, 1), value=-100).flatten() != -100
    for row, layer in enumerate(out.layers):
        wanted = logits[layer].flatten(0, 1).argmax(-1)[valid]
        assert torch.equal(out.statistics.prediction[row, valid], wanted)


@pytest.mark.parametrize("full", [True, False])
def test_score_measures_every_depth_that_was_run(full):
    model = TinyExits()
    ids, labels = batch()
    statistics, layers = score(model(ids, full=full), labels)
    assert layers == ((1, 3, FULL) if full else (1, 3))
    logits = logits_of(model, ids)
    valid = F.pad(labels[:, 1:], (0, 1), value=-100).flatten() != -100
    for row, layer in enumerate(layers):
        probs = logits[layer].detach().flatten(0, 1).softmax(-1)[valid]
        torch.testing.assert_close(statistics.nll[row].sum() / valid.sum(), hf_loss(logits[layer], labels).detach())
        torch.testing.assert_close(statistics.entropy[row, valid], -(probs * probs.log()).sum(-1))
        top = probs.topk(2).values
        torch.testing.assert_close(statistics.margin[row, valid], top[:, 0] - top[:, 1])
    assert not statistics.nll.requires_grad


def test_needs_full_depth_follows_the_weight():
    assert MultiExitCrossEntropy().needs_full_depth()
    objective = bound(MultiExitCrossEntropy(full_weight=0.0))
    assert not objective.needs_full_depth()
    model = TinyExits()
    ids, labels = batch()
    out = objective(model(ids, full=False), labels, step=0)
    assert out.layers == LAYERS
    assert not MultiExitCrossEntropy.freezes_backbone


@pytest.mark.parametrize(
    ("build", "layers", "message"),
    [
        (lambda: MultiExitCrossEntropy(full_weight=-1.0), LAYERS, "full_weight is -1.0"),
        (lambda: MultiExitCrossEntropy(schedule="linear"), LAYERS, "schedule_steps is 0"),
        (lambda: MultiExitCrossEntropy(weights=[1.0]), LAYERS, "weights has 1 entries"),
        (lambda: MultiExitCrossEntropy(weights={2: 1.0}), LAYERS, "weights names layer 2"),
        (lambda: MultiExitCrossEntropy(full_weight=0.0), (), "full_weight is 0 and so is the weight of every"),
        (lambda: MultiExitCrossEntropy(), (1, 5), r"exits are at layers \[1, 5\] of a model with 4 blocks"),
        (lambda: MultiExitCrossEntropy(), (0, 1), r"exits are at layers \[0, 1\]"),
        (lambda: MultiExitCrossEntropy(), (2, 2), r"exits are at layers \[2, 2\]"),
        (lambda: EETuning(), (), r"EETuning trains nothing: exits are \[\]"),
        (lambda: EETuning(weights=0.0), LAYERS, r"EETuning trains nothing: exits are \[1, 3\], weights 0.0"),
        (lambda: EETuning(confidence_weights=True, kernel="cce"), LAYERS, "kernel='cce' computes no confidence"),
        (lambda: EETuning(kernel="cce", distillation=Distillation()), LAYERS, "kernel='cce' knows labels only"),
        (
            lambda: MultiExitCrossEntropy(kernel="cce", distillation=Distillation()),
            LAYERS,
            "kernel='cce' knows labels only, and distillation is on.",
        ),
        (
            lambda: MultiExitCrossEntropy(full_weight=0.0, distillation=Distillation()),
            LAYERS,
            "full_weight is 0, and exits are distilled from the full depth: nothing would train it",
        ),
        (lambda: Distillation(share=0.0), LAYERS, "distillation.share is 0.0"),
        (lambda: Distillation(share=1.5), LAYERS, "distillation.share is 1.5"),
        (lambda: Distillation(share=float("nan")), LAYERS, "distillation.share is nan"),
        (lambda: Distillation(top_k=0), LAYERS, "distillation.top_k is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(build, layers, message):
    with pytest.raises(ConfigError, match=message):
        bound(build(), layers)
