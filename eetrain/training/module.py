"""The LightningModule: a multi-exit model, an objective, and what a Trainer needs to run them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eetrain.backbones.routers import has_routers
from eetrain.errors import ConfigError
from eetrain.exits import ExitConfig, MultiExitModel, MultiExitOutput
from eetrain.objectives import FULL, MultiExitCrossEntropy, Objective, ObjectiveOutput, score
from eetrain.objectives.gate_targets import gate_logits
from eetrain.objectives.linear_ce import IGNORE_INDEX, shift_labels
from eetrain.objectives.token_statistics import TokenStatistics
from eetrain.training.building import adapt, build_model, freeze_idle, resolved_settings
from eetrain.training.checkpoint_state import (
    check_settings,
    check_state,
    with_frozen_backbone,
    without_frozen_backbone,
)
from eetrain.training.consistency import check_consistency
from eetrain.training.gate_metrics import GateMetrics, collapsed
from eetrain.training.metrics import ExitMetrics, reset
from eetrain.training.optimization import build_adamw, build_schedule
from eetrain.training.precision import keeping_tables
from eetrain.training.randomness import batch_seed, seed_generators
from eetrain.training.settings import BackboneConfig, LoraSettings, ModelSettings, OptimizerConfig, Tuning
from eetrain.training.step_terms import TOTAL, StepTerms

Batch = dict[str, Tensor]
_RECORD = "eetrain"


class EarlyExitModule(LightningModule):
    """Trains exits into a decoder, alone, with adapters, or together with all of it.

    Construction is cheap; the model is built in :meth:`configure_model`. Dropout is a function of seed, rank and batch
    number, so a resumed run continues bitwise. Loss and gradients are means over the scored tokens of *all* processes.

    Example:
        >>> module = EarlyExitModule(BackboneConfig(path="path"), ExitConfig(every=4), MultiExitCrossEntropy())
        >>> module.settings.tuning
        'full'

    Args:
        backbone: where the backbone comes from.
        exits: where exits stand and what their heads are.
        objective: what is minimised.
        tuning: ``full`` trains everything, ``frozen`` the exits, ``lora`` exits and adapters.
        lora: the adapters.
        optimizer: AdamW and its schedule.
        activation_checkpointing: recompute the backbone's blocks in backward instead of keeping their activations.
        router_loss: add the auxiliary loss of a mixture of experts.
        predict_policy: the exit policy of ``predict``, such as ``never`` or ``threshold:0.9``.
        predict_max_new_tokens: how many tokens ``predict`` generates at most.

    Raises:
        ConfigError: settings that contradict each other.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        exits: ExitConfig,
        objective: Objective,
        tuning: Tuning = "full",
        lora: LoraSettings = LoraSettings(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        activation_checkpointing: bool = False,
        router_loss: bool = True,
        predict_policy: str = "never",
        predict_max_new_tokens: int = 64,
    ) -> None:
        super().__init__()
        self.settings = ModelSettings(backbone, exits, tuning, lora)
        self.objective = objective
        self.optimizer_config = optimizer
        self.activation_checkpointing, self.router_loss = activation_checkpointing, router_loss
        self.predict_policy, self.predict_max_new_tokens = predict_policy, predict_max_new_tokens
        self.model: MultiExitModel | None = None
        self.parameter_counts = (0, 0)  # trained and all of the whole model, whatever a strategy leaves here
        self.beside_model: dict[str, nn.Parameter] = {}  # what a strategy needs trained for its own ends
        self.metrics = nn.ModuleDict()
        self.gate_metrics = nn.ModuleDict()
        self.scores: dict[str, dict[str, float]] = {}
        self.scored_at: int | None = None
        self.step_terms = StepTerms()  # of the present batch, known before the optimizer steps
        self._noise_seed: int | None = None
        self._tokens_seen: Tensor = torch.zeros((), dtype=torch.int64)
        check_consistency(objective, self.settings, activation_checkpointing)
        self._record_settings()

    @classmethod
    def from_model(
        cls, model: MultiExitModel, objective: Objective | None = None, *, tuning: Tuning = "full", **settings: Any
    ) -> EarlyExitModule:
        """Train a model that is already there.

        Args:
            model: used as it is, and changed: frozen or given adapters as ``tuning`` asks. ``full`` leaves
                ``requires_grad`` as it is.
            objective: see the class; by default `MultiExitCrossEntropy()`.
            tuning: see the class.
            **settings: other arguments of the class, except ``backbone`` and ``exits``.
        """
        fields = json.loads(model.causal_lm.config.to_json_string(use_diff=False))
        objective = MultiExitCrossEntropy() if objective is None else objective
        module = cls(BackboneConfig(config=fields), model.config, objective, tuning, **settings)
        module._adopt(adapt(model, module.settings))
        return module

    def configure_model(self) -> None:
        """Build the model, once."""
        if self.model is None:
            self._adopt(build_model(self.settings))

    def train(self, mode: bool = True) -> EarlyExitModule:
        """Switch to training; a frozen backbone stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.model is not None and self.settings.tuning == "frozen":
            self.model.backbone.eval()
        return self

    def forward(
        self, batch: Batch, *, full_depth: bool, routers: bool = False, exits: Sequence[int] | None = None
    ) -> MultiExitOutput:
        """Run the model on a batch of the data module, each block where the objective wants it.

        Args:
            batch: of the data module.
            full_depth: see :meth:`eetrain.exits.MultiExitModel.forward`.
            routers: see there.
            exits: see there.
        """
        model, mask, positions = self._built(), batch.get("attention_mask"), batch.get("position_ids")
        active_LBT = self.objective.active_blocks(batch["labels"], positions, step=self._step(), training=self.training)
        if active_LBT is not None and routers and has_routers(model.backbone):
            rank_zero_warn("The routers get no auxiliary loss where blocks run at some positions only.")
        output: MultiExitOutput = model(
            batch["input_ids"],
            mask,
            positions,
            exits=exits,
            full_depth=full_depth,
            routers=routers,
            active_LBT=active_LBT,
            reach_all=self.training and self.objective.unreached == "zero",
        )
        return output

    def on_fit_start(self) -> None:
        """Agree on a seed for dropout, unless a checkpoint brought one, and check that the run suits the objective.

        Raises:
            ConfigError: the run is too short, or its strategy would wait for parameters that rest.
        """
        self.objective.prepare_run(self.trainer.estimated_stepping_batches, trial=bool(self.trainer.fast_dev_run))
        self._check_strategy()
        if self._noise_seed is None:
            self._noise_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout for this batch."""
        self.seed_noise(self.global_rank)

    def seed_noise(self, process: int) -> None:
        """Seed dropout and other noise of this batch; processes with equal numbers draw equally."""
        assert self._noise_seed is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        seed_generators(batch_seed(self._noise_seed, process, done))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective's loss, weighted by this process's share of the scored tokens."""
        result = self.compute_loss(batch)
        share, means, seen = self._over_processes(batch, result)
        local = {TOTAL: result.total, **result.terms}
        self.step_terms = StepTerms(means, {name: value.detach() for name, value in local.items()})
        self.log_step(means, seen)
        return result.total * share

    def log_step(self, means: dict[str, Tensor], seen: Tensor, rates: Mapping[str, float] | None = None) -> None:
        """Log a step of all processes.

        Args:
            means: ``loss`` and the objective's terms.
            seen: tokens that were fed in.
            rates: learning rates by part of the model; those of this process's optimizer if left out.
        """
        if rates is None:
            rates = {group["name"]: group["lr"] for group in self.trainer.optimizers[0].param_groups}
        # Stays on the device: reading it would wait for the step.
        self._tokens_seen = self._tokens_seen.to(seen.device) + seen.long()
        self.log("train/loss", means["loss"], prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in means.items() if name != "loss"})
        self.log("train/tokens", self._tokens_seen.float())
        self.log_dict({f"train/lr/{part}": rate for part, rate in rates.items()})

    def compute_loss(self, batch: Batch, *, statistics: bool = False) -> ObjectiveOutput:
        """Forward pass and objective of one batch at the present step."""
        step = self._step()
        trains, weights = self.objective.trains_model_at(step), self.objective.depth_weights(step)
        exits = None if weights is None else [depth for depth in weights if depth != FULL]
        routers = self.router_loss and self.settings.tuning != "frozen" and trains
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            # Not self(...): an engine's hooks on this module would end there and take away what the loss needs.
            full_depth = self.objective.needs_full_depth()
            output = self.forward(batch, full_depth=full_depth, routers=routers, exits=exits)
        return self.objective(output, batch["labels"], step=step, statistics=statistics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score all exits on a batch."""
        self._score(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score all exits on a batch."""
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log ``val/nll/exit_3`` and so on, over all processes."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/nll/exit_3`` and so on, over all processes."""
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Generate greedily under ``predict_policy``; returns the new tokens ``[B, new]``."""
        prompt = batch["input_ids"]
        ids: Tensor = self._built().generate(
            prompt,
            attention_mask=batch["attention_mask"],
            exit_policy=self.predict_policy,
            max_new_tokens=self.predict_max_new_tokens,
            do_sample=False,
        )
        return ids[:, prompt.shape[1] :]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the trainable parameters, with its schedule stepped every optimizer step."""
        optimizer = build_adamw((*self.named_parameters(), *self.beside_model.items()), self.optimizer_config)
        schedule = build_schedule(optimizer, self.optimizer_config, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out a frozen backbone that can be read again; add what resuming needs."""
        if self.settings.omits_backbone:
            checkpoint["state_dict"] = without_frozen_backbone(checkpoint["state_dict"], self)
        checkpoint[_RECORD] = {
            **self._record(),
            "noise_seed": self._noise_seed,
            "tokens_seen": int(self._tokens_seen),
            "exit_policy": self.objective.exit_policy(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, and complete it by the frozen backbone.

        Raises:
            CheckpointError: it is of another model.
        """
        self.configure_model()
        record = checkpoint.get(_RECORD, {})
        check_settings(record, self._record())
        if self.settings.omits_backbone:
            checkpoint["state_dict"] = with_frozen_backbone(checkpoint["state_dict"], self)
        check_state(checkpoint["state_dict"], self)
        self._noise_seed = record.get("noise_seed")
        self._tokens_seen = torch.tensor(record.get("tokens_seen", 0))

    def _apply(self, fn: Any, recurse: bool = True) -> EarlyExitModule:
        with keeping_tables(self):
            # What other stages of a pipeline hold has no numbers to move.
            super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)
        return self

    def _adopt(self, model: MultiExitModel) -> None:
        self.objective.bind(model.exit_layers, model.num_blocks)
        self.objective.bind_gates(gates.cost_weights if (gates := model.config.gates) else ())
        freeze_idle(model, full_depth=self.objective.needs_full_depth(), idle_blocks=self.objective.idle_blocks())
        if self.activation_checkpointing:
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model
        for stage in ("val", "test"):
            self.metrics[stage] = ExitMetrics(model.exit_layers, model.full_depth_loaded)
            if gates is not None and model.full_depth_loaded:
                gated = [layer for layer in model.exit_layers if str(layer) in model.gates]
                self.gate_metrics[stage] = GateMetrics(gated, model.num_blocks, gates.cost_weights)
        self.settings = resolved_settings(self.settings, model)
        self._record_settings()
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        self.parameter_counts = (sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
        self.train()

    def _built(self) -> MultiExitModel:
        assert self.model is not None, "the model is built in configure_model()"
        return self.model

    def _step(self) -> int:
        return self.global_step if self._trainer is not None else 0

    def _record_settings(self) -> None:
        self.save_hyperparameters(self.settings.to_dict())

    def _record(self) -> dict[str, Any]:
        return {"frozen_backbone": self.settings.backbone.path if self.settings.omits_backbone else None}

    def _check_strategy(self) -> None:
        wrapper = self.trainer.strategy.model
        if not (self.objective.lets_rest and isinstance(wrapper, DistributedDataParallel)):
            return
        if not wrapper.find_unused_parameters:
            raise ConfigError(
                f"The objective {type(self.objective).__name__} leaves some parameters out of a step, and "
                "trainer.strategy=ddp waits for the gradient of each.",
                hint="Set trainer.strategy=ddp_find_unused_parameters_true.",
            )

    @torch.no_grad()
    def _over_processes(
        self, batch: Batch, result: ObjectiveOutput
    ) -> tuple[Tensor | float, dict[str, Tensor], Tensor]:
        """What makes averaged gradients those of the mean over all tokens; means of what is logged; tokens fed in."""
        dtype = result.total.dtype
        scored = (shift_labels(batch["labels"]) != IGNORE_INDEX).sum().to(dtype)
        seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum().to(dtype)
        values = {"loss": result.total, **result.terms}
        means = torch.stack([value.detach().to(dtype) for value in values.values()])
        if self.trainer.world_size == 1:
            return 1.0, dict(zip(values, means, strict=True)), seen
        sums = self.trainer.strategy.reduce(torch.cat([torch.stack([scored, seen]), means * scored]), reduce_op="sum")
        total = sums[0].clamp(min=1)
        return scored * self.trainer.world_size / total, dict(zip(values, sums[2:] / total, strict=True)), sums[1]

    def _score(self, batch: Batch, stage: Literal["val", "test"]) -> None:
        output = self.forward(batch, full_depth=self._built().full_depth_loaded)
        statistics, layers = score(output, batch["labels"])
        self.record_scores(stage, statistics, layers, shift_labels(batch["labels"]))

    def record_scores(
        self, stage: Literal["val", "test"], statistics: TokenStatistics, layers: tuple[int, ...], labels_N: Tensor
    ) -> None:
        """Add a batch to the metrics.

        Args:
            stage: whose metrics.
            statistics: ``[E, N]``.
            layers: the layer of each row.
            labels_N: shifted labels.
        """
        metrics = self.metrics[stage]
        assert isinstance(metrics, ExitMetrics)
        metrics.update(statistics, layers, labels_N)
        if stage in self.gate_metrics:
            gates = self.gate_metrics[stage]
            assert isinstance(gates, GateMetrics)
            logits_NKG = gate_logits(self._built().gates_by_layer(), statistics, labels_N)
            gates.update(logits_NKG, statistics, layers, labels_N)

    def _log_scores(self, stage: Literal["val", "test"]) -> None:
        metrics = self.metrics[stage]
        assert isinstance(metrics, ExitMetrics)
        values = metrics.compute()
        if stage in self.gate_metrics:
            gates = self.gate_metrics[stage]
            assert isinstance(gates, GateMetrics)
            values |= gates.compute()
            reset(gates)
        if self.trainer.sanity_checking:
            return
        self.scores[stage] = {name: float(value) for name, value in values.items()}
        self.scored_at = self.global_step
        self._warn_of_collapsed_gates(self.scores[stage])
        # The values are those of all processes already; averaging them once more keeps Lightning from warning.
        self.log_dict({f"{stage}/{name}": value.float() for name, value in values.items()}, sync_dist=True)

    def _warn_of_collapsed_gates(self, scores: dict[str, float]) -> None:
        # Before their first turn gates let nobody leave; that is no news.
        untrained = not any(bool(gate.output.weight.any()) for gate in self._built().gates.values())  # type: ignore[union-attr, operator]
        found = [] if untrained else collapsed(scores)
        if found:
            rank_zero_warn(f"Gates out of use; {'; '.join(found)}.")
