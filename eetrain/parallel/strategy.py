"""Pipeline parallelism under Lightning: one batch of a replica is one step of DeepSpeed's pipeline."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eetrain.errors import EETrainError, TopologyError
from eetrain.objectives import JointGating, ObjectiveOutput
from eetrain.objectives.weighted_sum import distils
from eetrain.parallel.checkfree import Power
from eetrain.parallel.cut import Cut, balanced_bounds, cut
from eetrain.parallel.deepspeed_setup import EnginePrecision, engine_config, load_deepspeed, start_engine
from eetrain.parallel.engine_strategy import EngineStrategy
from eetrain.parallel.fillers import fill, fill_groups
from eetrain.parallel.gate_training import GateTrainer
from eetrain.parallel.gradient_norm import GradientNorm, total_norm
from eetrain.parallel.rates import peak_rates
from eetrain.parallel.rebuilding import Rebuild, StageRebuilder
from eetrain.parallel.rebuilt_groups import separate
from eetrain.parallel.refusals import check_routers, check_run
from eetrain.planning.topology import Topology, check_micro_batches
from eetrain.training import EarlyExitModule
from eetrain.training.checkpoint_reading import CheckpointFolder
from eetrain.training.console import tell
from eetrain.training.optimization import build_adamw, parameter_groups
from eetrain.training.processes import present_processes
from eetrain.training.step_terms import PHASE, TOTAL, StepTerms

if TYPE_CHECKING:
    from eetrain.parallel.pipeline import ExitPipeline
    from eetrain.parallel.runner import PipelineRunner

_USUAL_LENGTH = 512


class PipelineStrategy(EngineStrategy):
    """Cut the model into stages, one process each; several replicas of the pipeline share the data.

    Losses, gradients, metrics and checkpoints are those of one process with the batches of all replicas. Exits may
    stand on any stage; a parameter that several stages use (a tied output matrix, say) has a copy on each, whose
    gradients are added up. Stages compute equally much, exits counted.

    Example::

        trainer:
          devices: 4
          strategy: {class_path: eetrain.parallel.PipelineStrategy, init_args: {stages: 2, micro_batches: 8}}

    Args:
        stages: of the pipeline; they divide the processes, and the rest are replicas. One stage is a pipeline, too.
        micro_batches: that a batch of a replica is cut into; they divide ``data.batch_size``.
        precision: see :class:`EngineStrategy`.
        zero_stage: 1 shares the optimizer's state out among replicas; DeepSpeed's pipelines go no further.
        rebuild: what is done where a fit goes on from a checkpoint with a lost stage, one with a file missing or
            damaged. ``never`` takes the newest whole checkpoint instead, ``lost`` makes the stage anew from the two
            beside it (CheckFree, see :mod:`eetrain.parallel.checkfree`). A list of stages, from 0, is made anew even if
            they are whole, but only from a checkpoint of a fit that did not list them: once, not at every resume. The
            stages are those that wrote the checkpoint. Of what was rebuilt the optimizer begins anew.
        rebuild_power: of the gradients' norms in the weights of the two stages, 1 or 2.
        rebuild_lr_factor: what peak learning rates of rebuilt parameters are multiplied by, for the rest of the run.

    Raises:
        ConfigError: an unknown precision, or a wrong value of what begins with ``rebuild``.
        TopologyError: no stage or no micro-batch, or a ZeRO stage that goes with no pipeline.
    """

    def __init__(
        self,
        stages: int = 2,
        micro_batches: int = 8,
        precision: EnginePrecision = "float32",
        zero_stage: int = 0,
        rebuild: Rebuild = "never",
        rebuild_power: Power = 1,
        rebuild_lr_factor: float = 1.1,
    ) -> None:
        super().__init__(precision)
        if zero_stage not in (0, 1):
            raise TopologyError(
                f"trainer.strategy.init_args.zero_stage={zero_stage}, but a pipeline keeps whole gradients and "
                "parameters between micro-batches.",
                hint="Set it to 0 or 1, or use eetrain.parallel.ZeroStrategy without stages.",
            )
        if stages < 1:
            raise TopologyError(f"stages={stages}, but a pipeline has at least one.", hint="Set it to 1 or more.")
        check_micro_batches(micro_batches)
        self.stages, self.micro_batches, self.zero_stage = stages, micro_batches, zero_stage
        self.pipeline: ExitPipeline | None = None
        self.runner: PipelineRunner | None = None
        self.gate_trainer: GateTrainer | None = None
        self._rebuilder = StageRebuilder(rebuild, rebuild_power, rebuild_lr_factor)
        self._cut: Cut | None = None
        self._norm: GradientNorm | None = None
        self._rates: dict[str, float] = {}

    @property
    def topology(self) -> Mapping[str, int]:
        """Stages, replicas and ZeRO stage."""
        return {"stages": self.stages, "replicas": self.world_size // self.stages, "zero_stage": self.zero_stage}

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The stages of a replica read the same data."""
        replicas = self.world_size // self.stages
        return {"num_replicas": replicas, "rank": self.global_rank % replicas}

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what a pipeline cannot do as one process does it; see :meth:`EngineStrategy.check`.

        Raises:
            ConfigError: a setting in the wrong place, or an objective that cannot be taken apart.
            TopologyError: stages or micro-batches that do not divide.
        """
        super().check(trainer, module)
        Topology.of(self.num_processes * self.num_nodes, self.stages, max(self.stages, 1))
        check_micro_batches(self.micro_batches, getattr(trainer.datamodule, "batch_size", None))
        check_run(trainer, module, self.zero_stage, self.precision)

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Let the processes of a machine build the model one after the other, each keeping its stage only.

        Raises:
            EETrainError: the model could not be built or cut, on this process or on another.
        """
        error: BaseException | None = None
        for turn in range(self.num_processes):
            if turn == self.local_rank:
                try:
                    yield
                    self._cut_model()
                except BaseException as caught:
                    error = caught
            told: list[EETrainError | None] = [None] * self.world_size
            dist.all_gather_object(told, None if error is None else self._for_others(error))
            if error is not None:
                raise error
            for of_another in filter(None, told):
                raise of_another

    def _for_others(self, error: BaseException) -> EETrainError:
        """What processes raise because this one could not build its stage."""
        if isinstance(error, EETrainError):
            return error
        reason = f"{type(error).__name__}: {error}"
        return EETrainError(f"Process {self.global_rank} could not build its stage ({reason}).")

    def setup(self, trainer: Trainer) -> None:
        """Build the pipeline, and the optimizer and the gates' own for a fit."""
        from eetrain.parallel.pipeline import ExitPipeline

        assert self.accelerator is not None
        assert self._cut is not None
        self.accelerator.setup(trainer)
        self._failed = False
        self.model = self._module
        if self.pipeline is None:
            self.model_to_device()
            self.pipeline = ExitPipeline(self._cut)
        if trainer.state.fn == TrainerFn.FITTING:
            tell(trainer, f"Pipeline: {self._cut}; replicas: {self._cut.topology.replicas}.")
            clip_norm = trainer.gradient_clip_val or None
            self._setup_optimizers(trainer, self.pipeline, clip_norm)
            (optimizer,) = self.optimizers
            self.build_engine(optimizer, clip_norm)
            self.let_drop(self.engine.basic_optimizer)
            self._norm = GradientNorm(self.engine, self._cut.stage.trained_in_blocks())
            self.optimizers = [self.engine.optimizer]
        elif self.engine is None:
            self.build_engine(None, None)

    def build_engine(self, optimizer: Optimizer | None, clip_norm: float | None) -> Any:
        """The pipeline's engine, and what feeds it."""
        from eetrain.parallel.runner import PipelineRunner

        assert self._cut is not None
        assert self.pipeline is not None
        zero_stage = 0 if optimizer is None else self.zero_stage
        config = engine_config(
            zero_stage=zero_stage, precision=self.precision, clip_norm=clip_norm, accumulate=self.micro_batches
        )
        self.engine = start_engine(self.pipeline, optimizer, config)
        objective = self._module.objective
        self.runner = PipelineRunner(self.pipeline, self.engine, objective, self._cut.topology, self.micro_batches)
        return self.engine

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """A whole step: every micro-batch forward and backward, then the optimizer."""
        module, runner = self._module, self._built
        module.seed_noise(self.global_rank % runner.topology.replicas)
        active_LBT = module.objective.active_blocks(
            batch["labels"], batch.get("position_ids"), step=module.global_step, training=True
        )
        if self.stages > 1:
            module.seed_noise(self.world_size + self.global_rank)
        step = module.global_step
        if isinstance(module.objective, JointGating) and module.objective.phase(step) == "gates":
            self._train_gates(module.objective, batch)
        else:
            runner.train(batch, step, active_LBT, before_step=self._before_step)
        means = dict(module.step_terms.means)
        seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum().double()
        rates = {part: rate * self._rate_factor for part, rate in self._rates.items()}
        module.log_step(means, runner.over_replicas(seen), rates)
        return means[TOTAL]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score all depths of a batch."""
        self._score(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score all depths of a batch."""
        self._score(batch, "test")

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing is left to do after the step."""
        return closure_loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the step, which contains that of the optimizer."""
        result = closure()
        self._drops_step = False
        return result

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of this stage and of the gates; replicas have not added theirs up."""
        assert self.pipeline is not None
        narrow = self.engine.using_bf16_optimizer  # which sums gradients up in float32, beside the parameter
        grads = [(p, getattr(p, "_hp_grad", None) if narrow else p.grad) for p in self.pipeline.parameters()]
        if self.gate_trainer is not None:
            grads += [(parameter, parameter.grad) for parameter in self.gate_trainer.named.values()]
        return ((parameter, grad) for parameter, grad in grads if grad is not None)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Names with the parameters that this process's stage stores."""
        assert self._cut is not None
        owners, index = self._cut.owners, self._cut.stage.index
        state = super().lightning_module_state_dict()
        return {name: t for name, t in state.items() if owners.get(name.removeprefix("model."), 0) == index}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder that knows what was rebuilt; all processes take part."""
        super().save_checkpoint({**checkpoint, **self._rebuilder.record()}, filepath, storage_options)

    def gradient_norms(self) -> list[float | None]:
        """Of every stage the norm of its blocks' last gradient."""
        own = None if self._norm is None else self._norm.square()
        sharded = self._norm is not None and self._norm.sharded
        replicas, squares = self.world_size // self.stages, present_processes().gather(own)
        stages = [squares[stage * replicas : (stage + 1) * replicas] for stage in range(self.stages)]
        return [total_norm(parts if sharded else parts[:1]) for parts in stages]

    def locate(self, path: Path, *, resuming: bool) -> Path:
        """The checkpoint to go on from; lost stages are no hindrance if they can and may be rebuilt."""
        if not resuming:
            return super().locate(path, resuming=resuming)
        return self._rebuilder.locate(path, module=self._module, processes=present_processes())

    def open_folder(self, path: Path, *, resuming: bool) -> CheckpointFolder:
        """The folder that was located, with the stages in it that are to be rebuilt."""
        if not resuming:
            return super().open_folder(path, resuming=resuming)
        return self._rebuilder.open(path, module=self._module, processes=present_processes())

    def state_tensors(self, named: Mapping[str, Tensor], *, optimizer: bool) -> Iterator[tuple[str, Tensor]]:
        """The engine's, and on one process those of the gates' optimizer."""
        yield from super().state_tensors(named, optimizer=optimizer)
        if optimizer and self.gate_trainer is not None and self.global_rank == 0:
            yield from self.gate_trainer.state_tensors()

    def held_names(self) -> Container[str] | None:
        """What is on this stage."""
        state = super().lightning_module_state_dict()
        return {name for name, tensor in state.items() if not tensor.is_meta}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put masters, moments and steps back, those of the gates as well."""
        if self.gate_trainer is not None:
            assert self._folder is not None
            self.gate_trainer.restore(self._folder)
        super().load_optimizer_state_dict(checkpoint)

    def teardown(self) -> None:
        """Leave the pipeline where it is: the model is in parts, and may be validated next."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.accelerator.teardown()
        self.optimizers = []

    @property
    def _module(self) -> EarlyExitModule:
        assert isinstance(self.lightning_module, EarlyExitModule)
        return self.lightning_module

    @property
    def _built(self) -> PipelineRunner:
        assert self.runner is not None, "the pipeline is built in setup()"
        return self.runner

    def _cut_model(self) -> None:
        model = self._module.model
        assert model is not None
        if self._cut is not None:
            return
        load_deepspeed()
        self.check_types(model)
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            # Refuses a model with nothing to train, which anchors would hide.
            parameter_groups(self._module.named_parameters(), self._module.optimizer_config)
        topology = Topology.of(self.world_size, self.stages, model.num_blocks)
        check_routers(self._module, model)
        length = getattr(self._module.trainer.datamodule, "max_length", _USUAL_LENGTH)
        bounds = balanced_bounds(
            model,
            self.stages,
            length,
            full_depth=self._module.objective.needs_full_depth(),
            checkpointing=self._module.activation_checkpointing,
            distils=distils(self._module.objective),
        )
        self._cut = cut(model, bounds, topology, self.global_rank)

    def _setup_optimizers(self, trainer: Trainer, pipeline: ExitPipeline, clip_norm: float | None) -> None:
        """AdamW over the stage's parameters. Gates rest while others learn, so they have one of their own."""
        module = self._module
        assert module.model is not None
        gates = {name: p for name, p in module.named_parameters() if name.startswith("model.gates.")}
        module.beside_model = {name: p for name, p in pipeline.named_parameters() if name.endswith(".anchor")}
        module.model.gates.requires_grad_(False)
        if self.zero_stage:
            of_stage = (*module.named_parameters(), *module.beside_model.items())
            module.beside_model |= fill_groups(pipeline, parameter_groups(of_stage, module.optimizer_config))
        self.setup_optimizers(trainer)
        module.model.gates.requires_grad_(True)
        if self._rebuilder.names:
            self._separate_rebuilt(pipeline)
        if gates:
            own = build_adamw(gates.items(), module.optimizer_config)
            for group in own.param_groups:
                group["initial_lr"] = group["lr"]
            self.let_drop(own)
            self.gate_trainer = GateTrainer(gates, own, clip_norm)
        groups = list(self.optimizers[0].param_groups)
        if self.gate_trainer is not None:
            groups += self.gate_trainer.optimizer.param_groups
        self._rates = peak_rates(groups, fillers=module.beside_model.values())

    def _separate_rebuilt(self, pipeline: ExitPipeline) -> None:
        """Put rebuilt parameters into groups of their own; ZeRO must find the same groups on every stage."""
        module = self._module

        def filler(like: dict[str, Any]) -> nn.Parameter:
            name, dim = f"rebuilt_{len(module.beside_model)}", like["params"][0].dim()
            made = module.beside_model[f"model.{name}"] = fill(pipeline, name, dim)
            return made

        rebuilt = {id(parameter) for name, parameter in module.named_parameters() if name in self._rebuilder.names}
        (schedule,) = (config.scheduler for config in self.lr_scheduler_configs)
        assert isinstance(schedule, LambdaLR)
        separate(self.optimizers[0], schedule, rebuilt, self._rebuilder.lr_factor, filler if self.zero_stage else None)

    @property
    def _rate_factor(self) -> float:
        """What the schedule makes of the peak at this step."""
        group = self.engine.basic_optimizer.param_groups[0]
        return float(group["lr"] / group["initial_lr"])

    def _before_step(self, terms: StepTerms) -> None:
        """Callbacks see the step's loss and gradients in the midst of the engine's work."""
        module, means = self._module, dict(terms.means)
        if isinstance(module.objective, JointGating):
            means[PHASE] = means[TOTAL].new_tensor(module.objective.phase_number(module.global_step))
        module.step_terms = StepTerms(means, terms.local)
        (optimizer,) = self.optimizers
        call._call_callback_hooks(module.trainer, "on_before_optimizer_step", optimizer)
        call._call_lightning_module_hook(module.trainer, "on_before_optimizer_step", optimizer)

    def _train_gates(self, objective: JointGating, batch: dict[str, Tensor]) -> None:
        assert self.gate_trainer is not None
        runner = self._built

        def before_step(result: ObjectiveOutput) -> None:
            means = {TOTAL: result.terms["gate_bce"].float(), **result.terms}
            self._before_step(StepTerms(means, {TOTAL: result.total.detach()}))

        gates, scored = runner.model.gates_by_layer(), runner.score(batch)
        self.gate_trainer.step(objective, gates, scored, runner.over_replicas, self._rate_factor, before_step)

    def _score(self, batch: dict[str, Tensor], stage: Literal["val", "test"]) -> None:
        module, runner = self._module, self._built
        active_LBT = module.objective.active_blocks(
            batch["labels"], batch.get("position_ids"), step=module.global_step, training=False
        )
        scored = runner.score(batch, active_LBT)
        module.record_scores(stage, scored.statistics, scored.layers, scored.labels_N)
