"""Fits of one process and of pipelines side by side: the same model, batches and optimizer.

AdamW runs with ``beta_1 = 0``: its first moment is then the gradient of the step before, whatever engine, ZeRO stage or
precision held it, and the gradients of every parameter and every step can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.objectives import MultiExitCrossEntropy, Objective
from eetrain.parallel import PipelineStrategy
from eetrain.parallel.engine_state import engine_tensors
from eetrain.parallel.stage import frame_parameters
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule
from eetrain.training.settings import OptimizerConfig

STEPS, ROWS, MICRO_BATCHES = 4, 8, 4
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
_MOMENT = "optimizer/exp_avg/"


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        family: of the tiny model.
        changes: to its configuration.
        exits: settings of the exits; after blocks 1, 2 and 3 with a norm of their own by default.
        objective: makes a fresh one.
        tuning: what of the backbone is trained.
        module: more settings of the module.
        packed: rows hold several documents, told apart by positions.
        prompts: every second batch begins with three tokens that are not scored.
        dropout: of all parts that have some.
        scattered: every process draws a backbone of its own; what several of them hold must become one.
        clip: largest norm of all gradients.
        strategy: more settings of the pipeline.
    """

    family: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)
    exits: dict[str, Any] = field(default_factory=dict)
    objective: Callable[[], Objective] = lambda: MultiExitCrossEntropy([0.1, 0.25, 0.5])
    tuning: str = "full"
    module: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    prompts: bool = False
    dropout: float = 0.0
    scattered: bool = False
    clip: float | None = None
    strategy: dict[str, Any] = field(default_factory=dict)


@dataclass
class Fitted:
    """What a process, or all of them together, have to show after a fit.

    Attributes:
        logged: loss and terms of every step.
        gradients: those of every step, by name; of a parameter that rests the last ones.
        scores: metrics of ``trainer.validate`` before the fit, of its own validation, and of ``validate`` after it.
        weights: by name.
    """

    logged: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    scores: list[dict[str, float]]
    weights: dict[str, Tensor]


class Keep(Callback):
    """Loss, terms and gradients of every step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.logged.append({name: value for name, value in found.items() if name.startswith("train/")})
        self.gradients.append({name: tensor.clone() for name, tensor in _moments(trainer, module)})


def _moments(trainer: Any, module: EarlyExitModule) -> list[tuple[str, Tensor]]:
    named = {name: p for name, p in module.named_parameters() if not p.is_meta}
    strategy = trainer.strategy
    if not isinstance(strategy, PipelineStrategy):
        states = trainer.optimizers[0].state
        return [(name, states[p]["exp_avg"]) for name, p in named.items() if p in states]
    tensors = list(engine_tensors(strategy.engine, named, owner=lambda place: True))
    if strategy.gate_trainer is not None:
        tensors += strategy.gate_trainer.state_tensors()
    return [(name.removeprefix(_MOMENT), tensor) for name, tensor in tensors if name.startswith(_MOMENT)]


def batch(seed: int, rows: int, case: Case) -> dict[str, Tensor]:
    """Rows with very different numbers of scored tokens, of a length that changes from batch to batch."""
    draw = torch.Generator().manual_seed(seed)
    length = 9 + seed % 3
    ids_BT = torch.randint(3, 61, (rows, length), generator=draw)
    if case.packed:
        starts_BT = torch.rand(rows, length, generator=draw) < 0.2
        place_T = torch.arange(length)
        begin_BT = torch.where(starts_BT, place_T, 0).cummax(1).values
        positions_BT = place_T - begin_BT
        # The first token of a document follows from nothing.
        return {
            "input_ids": ids_BT,
            "labels": ids_BT.masked_fill(positions_BT == 0, -100),
            "position_ids": positions_BT,
        }
    real_BT = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=draw)
    scored_BT = real_BT & (torch.arange(length) >= (3 if case.prompts and seed % 2 == 0 else 0))
    return {"input_ids": ids_BT, "labels": ids_BT.masked_fill(~scored_BT, -100), "attention_mask": real_BT.long()}


def part(rows: dict[str, Tensor], replica: int, replicas: int) -> dict[str, Tensor]:
    return {name: value[replica::replicas] for name, value in rows.items()}


def build(case: Case) -> EarlyExitModule:
    """The same module on every process."""
    seed = dist.get_rank() if case.scattered and dist.is_initialized() else 0
    torch.manual_seed(seed)
    exits = ExitConfig(**{"layers": [1, 2, 3], **case.exits})
    model = MultiExitModel(tiny_model(case.family, seed=seed, dtype=torch.float32, **case.changes), exits)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = case.dropout
    built = EarlyExitModule.from_model(
        model,
        case.objective(),
        tuning=case.tuning,
        # A large eps makes updates follow gradients instead of their signs.
        optimizer=OptimizerConfig(
            lr=1e-2, eps=1e-2, weight_decay=0.1, betas=(0.0, 0.9), schedule="linear", warmup_steps=1
        ),
        **case.module,
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            # Adapters begin at 0, which hides their other half, and heads as copies of the backbone's parts.
            if "lora_B" in name or name.startswith("model.exits."):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built


def fit(case: Case, stages: int = 0) -> Fitted:
    """Fit and validate; as a pipeline of ``stages`` on all processes, or alone with the batches of all replicas."""
    rank, num = (dist.get_rank(), dist.get_world_size()) if stages else (0, 1)
    replicas = num // stages if stages else 1
    settings = {"micro_batches": MICRO_BATCHES, **case.strategy}
    strategy: Any = PipelineStrategy(stages=stages, **settings) if stages else "auto"
    train = [part(batch(seed, ROWS, case), rank % replicas, replicas) for seed in range(STEPS)]
    # Six rows are no multiple of the micro-batches.
    held_out = [part(batch(100 + rows, rows, case), rank % replicas, replicas) for rows in (8, 6)]
    keep, module = Keep(), build(case)
    loader = functools.partial(DataLoader, batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=num,
        strategy=strategy,
        callbacks=[keep],
        use_distributed_sampler=False,
        gradient_clip_val=case.clip,
        num_sanity_val_steps=0,
        **QUIET,
    )
    trainer.validate(module, loader(held_out), verbose=False)
    scores = [dict(module.scores["val"])]
    trainer.fit(module, loader(train), loader(held_out))
    scores.append(dict(module.scores["val"]))
    trainer.validate(module, loader(held_out), verbose=False)
    scores.append(dict(module.scores["val"]))
    # Learned positions are on every stage, for harvesting, but learn on the first only.
    first = strategy._cut.stage.index == 0 if isinstance(strategy, PipelineStrategy) else True
    stale = set() if first else {id(parameter) for parameter in frame_parameters(module.model)}
    own = {name: p for name, p in module.named_parameters() if not p.is_meta and id(p) not in stale}
    return Fitted(keep.logged, keep.gradients, scores, {name: p.detach().clone() for name, p in own.items()})


def merged(of_ranks: list[Fitted]) -> Fitted:
    """What all processes have to show; what several of them hold is bitwise the same on each."""
    first = of_ranks[0]
    gradients: list[dict[str, Tensor]] = [{} for _ in first.gradients]
    weights: dict[str, Tensor] = {}
    for found in of_ranks:
        assert found.logged == first.logged
        assert found.scores == first.scores
        for ours, theirs in zip([*gradients, weights], [*found.gradients, found.weights], strict=True):
            for name, tensor in theirs.items():
                assert torch.equal(ours.setdefault(name, tensor), tensor), name
    return Fitted(first.logged, gradients, first.scores, weights)


def assert_same(found: Fitted, wanted: Fitted, name: str, tolerance: float = 1e-6, later: float = 1e-5) -> None:
    """Equal losses, terms, gradients, weights and metrics.

    Gradients and losses of the first step are equal to ``tolerance``, relatively where they exceed 1 (float32 tells
    numbers near 8 apart by 1e-6). What comes ``later`` builds on weights that AdamW has made of gradients that were
    rounded differently.
    """
    for step, (ours, theirs) in enumerate(zip(found.gradients, wanted.gradients, strict=True)):
        close(ours, theirs, later if step else tolerance, f"{name}: gradient of step {step}")
    for step, (ours_of, theirs_of) in enumerate(zip(found.logged, wanted.logged, strict=True)):
        close(ours_of, theirs_of, later if step else tolerance, f"{name}: logged in step {step}")
    for ours_of, theirs_of in zip(found.scores, wanted.scores, strict=True):
        close(ours_of, theirs_of, later, f"{name}: validation")
    close(found.weights, wanted.weights, later, f"{name}: weight")


def close(found: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float, what: str) -> None:
    """The same names, and values that are equal to ``tolerance``, relatively where they exceed 1."""
    assert found.keys() == wanted.keys(), f"{what}: {sorted(found.keys() ^ wanted.keys())}"
    for name in wanted:
        one, two = torch.as_tensor(found[name]), torch.as_tensor(wanted[name])
        apart = float(((one - two).abs() / two.abs().clamp(min=1)).nan_to_num().max())
        assert torch.equal(one.isnan(), two.isnan()), f"{what}: {name}"
        assert apart <= tolerance, f"{what}: {name} is {apart:.2g} off"
