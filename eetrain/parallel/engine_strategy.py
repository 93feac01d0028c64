"""What all strategies with a DeepSpeed engine share: settings in their place, the step, checkpoints as folders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from eetrain.errors import CheckpointError, ConfigError
from eetrain.parallel.deepspeed_setup import EnginePrecision, join_processes
from eetrain.parallel.engine_state import engine_tensors, partitioned_gradients, restore_engine
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.checkpoint_folder import CheckpointFolder, save_folder
from eetrain.training.processes import present_processes


class EngineStrategy(DDPStrategy):
    """Train with a DeepSpeed engine; validate, test and predict outside a fit with the plain module.

    A derived class builds the engine in :meth:`build_engine`. Precision and everything else that the engine decides is
    an argument of the strategy; what the Trainer would decide beside it is refused before the processes meet.

    Args:
        precision: of parameters and activations; with ``bfloat16`` the optimizer keeps float32 masters.

    Raises:
        ConfigError: an unknown precision.
    """

    optimizers: list[Any]

    def __init__(self, precision: EnginePrecision = "float32") -> None:
        super().__init__()
        if precision not in get_args(EnginePrecision):
            raise ConfigError(
                f"trainer.strategy.init_args.precision={precision!r} is not known.",
                hint=f"One of: {', '.join(get_args(EnginePrecision))}.",
            )
        self.precision: EnginePrecision = precision
        self.engine: Any = None
        self._folder: CheckpointFolder | None = None
        self._failed = False
        self._drops_step = False

    @abstractmethod
    def build_engine(self, optimizer: Optimizer, clip_norm: float | None) -> Any:
        """The engine around the module of the fit, which is on its device.

        Args:
            optimizer: AdamW over the trained parameters.
            clip_norm: largest norm of all gradients, or ``None``.
        """

    @property
    @abstractmethod
    def topology(self) -> Mapping[str, int]:
        """How many processes do what, for the record in a checkpoint."""

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse settings that the engine would ignore; runs on every process before they meet.

        Raises:
            ConfigError: a precision or way of clipping that is the Trainer's.
        """
        if self.precision_plugin.precision != "32-true":
            raise ConfigError(
                f"trainer.precision={self.precision_plugin.precision}, but {type(self).__name__} sets the precision.",
                hint="Leave trainer.precision out and set trainer.strategy.init_args.precision=bfloat16.",
            )
        if trainer.gradient_clip_algorithm == "value":
            raise ConfigError(
                f"trainer.gradient_clip_algorithm=value, but {type(self).__name__} clips by the norm of all gradients.",
                hint="Set trainer.gradient_clip_algorithm=norm, or leave it out.",
            )

    def check_types(self, module: nn.Module) -> None:
        """Refuse parameters of other types than the engine's precision asks for.

        Raises:
            ConfigError: names both.
        """
        types = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        wanted = {torch.float32} if self.precision == "float32" else {torch.float32, torch.bfloat16}
        if types - wanted:
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
            raise ConfigError(
                f"trainer.strategy.init_args.precision={self.precision}, but the model has parameters in {found}.",
                hint="Set model.backbone.dtype=float32; the strategy's precision decides about the rest.",
            )

    def setup_environment(self) -> None:
        """Check the settings, then let the processes meet."""
        module = self.lightning_module
        assert module is not None
        self.check(module.trainer, module)
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Build the process group, and let DeepSpeed join it."""
        super().setup_distributed()
        join_processes(self.local_rank, self.root_device)

    def setup(self, trainer: Trainer) -> None:
        """Build the optimizer and the engine for a fit; prepare the plain module for anything else."""
        self._failed = False
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.setup_optimizers(trainer)
        self.engine = self.build_engine(self.optimizers[0], trainer.gradient_clip_val or None)
        self.let_drop(self.engine.basic_optimizer)
        # Schedules keep the AdamW they were made for: the engine steps it, in whatever it wraps it.
        self.optimizers = [self.engine.optimizer]
        self.model = self.engine

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Send the loss backward through the engine; Lightning has divided it by the accumulated batches."""
        module = self.lightning_module
        assert module is not None
        loss: Tensor = self.precision_plugin.pre_backward(closure_loss, module)
        self.engine.backward(loss)
        after: Tensor = self.precision_plugin.post_backward(loss, module)
        return after

    def block_backward_sync(self) -> AbstractContextManager[None]:  # type: ignore[override, unused-ignore]
        """Nothing to block: the engine knows of accumulation by itself."""
        return nullcontext()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the last batch of a step, then let the engine clip and step."""
        module = self.lightning_module
        assert module is not None
        # Batches before it are run without this call, and must not reduce gradients as if they were the last.
        self.engine.set_gradient_accumulation_boundary(True)
        result = closure()
        self.settle_gradients()
        call._call_callback_hooks(module.trainer, "on_before_optimizer_step", optimizer)
        call._call_lightning_module_hook(module.trainer, "on_before_optimizer_step", optimizer)
        self.engine.step()
        self._drops_step = False
        self.engine.set_gradient_accumulation_boundary(False)
        return result

    def settle_gradients(self) -> None:
        """What is left to do with gradients when backward has ended on this process."""

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters with what this process holds of their gradients, before they are clipped."""
        return partitioned_gradients(self.engine)

    def drop_step(self) -> None:
        """Let the step that is about to come change neither weights nor moments; all processes say so."""
        self._drops_step = True

    def let_drop(self, optimizer: Optimizer) -> None:
        """Take the gradients from an AdamW in steps that are to be dropped: then it passes over everything.

        What the engine does around it, it does; from masters that stayed it makes the weights that were there.
        """

        def forget(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._drops_step:
                for group in optimizer.param_groups:
                    for piece in group["params"]:
                        piece.grad = None

        optimizer.register_step_pre_hook(forget)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Names with the parameters themselves: hooks may leave some out before :meth:`save_checkpoint` reads them."""
        assert self.lightning_module is not None
        return dict(self.lightning_module.state_dict(keep_vars=True))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: :meth:`save_checkpoint` takes it from the engine."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder; all processes take part."""
        named = checkpoint["state_dict"]
        whole = self.engine is not None and "optimizer_states" in checkpoint
        if self.engine is None and "optimizer_states" in checkpoint:
            rank_zero_warn("The engine has ended with the fit: this checkpoint holds no state of the optimizer.")
        state = {**checkpoint, "state_dict": {}, "optimizer_states": {}}
        if not whole:
            state.pop("optimizer_states")
        tensors = self.state_tensors(named, optimizer=whole)
        save_folder(
            filepath,
            tensors,
            state,
            topology=self.topology,
            gradient_norms=self.gradient_norms(),
            processes=present_processes(),
        )

    def gradient_norms(self) -> Sequence[float | None]:
        """Those of a pipeline's stages for the record in a checkpoint; all processes take part."""
        return ()

    def state_tensors(self, named: Mapping[str, Tensor], *, optimizer: bool) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds of this process, see :func:`engine_tensors`; all processes take part."""
        return engine_tensors(self.engine, named, optimizer=optimizer)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder, or the weights of a single file.

        Raises:
            CheckpointError: it cannot be read, or a fit is to be resumed from a single file.
        """
        assert self.lightning_module is not None
        fits = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        path = self.locate(Path(checkpoint_path), resuming=fits)
        if path.is_file():
            if fits:
                raise CheckpointError(
                    f"{path} is a single file, and {type(self).__name__} resumes from checkpoints that are folders.",
                    hint="Resume with the strategy that wrote it, or export it and set model.backbone.path.",
                )
            stored: dict[str, Any] = super().load_checkpoint(path, weights_only)
            return stored
        self._folder = self.open_folder(path, resuming=fits)
        state = self._folder.trainer_state()
        if fits and "optimizer_states" not in state:
            raise CheckpointError(
                f"{checkpoint_path} holds weights only, nothing to resume a fit from.",
                hint="Resume from a checkpoint that was written during a fit.",
            )
        # Rates are the schedule's at its step; a checkpoint of another topology may have other groups of parameters.
        schedules = [_without(schedule, "base_lrs", "_last_lr") for schedule in state.get("lr_schedulers", [])]
        return {**state, "lr_schedulers": schedules, "state_dict": self._folder.state_dict(self.held_names())}

    def locate(self, path: Path, *, resuming: bool) -> Path:
        """The checkpoint to read where ``path`` is asked for; see :meth:`AtomicCheckpointIO.locate`."""
        return AtomicCheckpointIO(resuming=resuming).locate(path)

    def open_folder(self, path: Path, *, resuming: bool) -> CheckpointFolder:
        """The folder that was located at ``path``."""
        return CheckpointFolder.open(path, check=False)

    def held_names(self) -> Container[str] | None:
        """Names of the tensors that this process has numbers of; ``None`` for all."""
        return None

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put masters, moments and steps of the folder read last into the engine, and the rates of its next step.

        Raises:
            CheckpointError: on every process, if one of them trains what has no state in the folder.
        """
        assert self._folder is not None
        assert self.lightning_module is not None
        problem: CheckpointError | None = None
        try:
            restore_engine(self.engine, dict(self.lightning_module.named_parameters()), self._folder)
        except CheckpointError as error:
            problem = error
        for found in present_processes().gather(problem):
            if found is not None:
                raise found
        self._folder = None
        for config, state in zip(self.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
            _set_rates(config.scheduler, state["last_epoch"])

    def on_exception(self, exception: BaseException) -> None:
        """Remember that the other processes may be anywhere: nothing collective comes after this."""
        self._failed = True

    def release_engine(self) -> None:
        """Give the module back as it was before the fit, with its trained weights; all processes take part."""

    def teardown(self) -> None:
        """End the engine; after a fit that was not interrupted the module is a plain one again."""
        if self.engine is not None:
            if not self._failed:
                self.release_engine()
            self.engine, self.model = None, self.lightning_module
            self.optimizers = []
        super().teardown()


def _without(state: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in names}


def _set_rates(schedule: Any, step: int) -> None:
    """Set the rates of a LambdaLR's step, which it leaves as they are when its own state is restored."""
    groups = schedule.optimizer.param_groups
    schedule._last_lr = [
        base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(groups, schedule._last_lr, strict=True):
        group["lr"] = rate
