"""Data parallel training whose optimizer state, gradients and parameters are shared out among the processes (ZeRO)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from eetrain.errors import ConfigError
from eetrain.exits import MultiExitModel
from eetrain.parallel.deepspeed_setup import EnginePrecision, engine_config, load_deepspeed, quiet, start_engine
from eetrain.parallel.engine_strategy import EngineStrategy
from eetrain.parallel.rest import Rest
from eetrain.parallel.unsharding import Traces
from eetrain.training import EarlyExitModule

ZeroStage = Literal[1, 2, 3]
_LINEAR = functional.linear
_PLAIN = "trainer.strategy=ddp_find_unused_parameters_true"


class ZeroStrategy(EngineStrategy):
    """DeepSpeed's ZeRO under Lightning, on GPUs and CPUs; exits, objectives and checkpoints are as on one process.

    Stage 1 shares out AdamW's state, 2 the gradients as well, 3 the parameters as well (arXiv 1910.02054). In stage 3
    blocks are put together while they run; output matrices and gates, which objectives read, for the whole of a forward
    and of a backward pass. Every process holds the whole module in the memory of its CPU before and after the fit;
    validate, test and predict outside of one do not shard.

    Example::

        trainer:
          strategy: {class_path: eetrain.parallel.ZeroStrategy, init_args: {stage: 3, precision: bfloat16}}

    Args:
        stage: of ZeRO.
        precision: see :class:`EngineStrategy`.
        stage3_param_persistence_threshold: parameters of at most so many numbers stay whole in stage 3.

    Raises:
        ConfigError: an unknown stage or precision, or a negative threshold.
    """

    def __init__(
        self,
        stage: ZeroStage = 2,
        precision: EnginePrecision = "float32",
        stage3_param_persistence_threshold: int = 100_000,
    ) -> None:
        super().__init__(precision)
        if stage not in get_args(ZeroStage):
            raise ConfigError(
                f"trainer.strategy.init_args.stage={stage!r} is not known.",
                hint="One of: 1, 2, 3; without sharding use trainer.strategy=ddp.",
            )
        if stage3_param_persistence_threshold < 0:
            raise ConfigError(
                f"stage3_param_persistence_threshold={stage3_param_persistence_threshold}.", hint="Set it to 0 or more."
            )
        self.stage, self.persistence_threshold = stage, stage3_param_persistence_threshold
        self._traces: Traces | None = None
        self._rest: Rest | None = None

    @property
    def topology(self) -> Mapping[str, int]:
        """Replicas, all of one stage, and the ZeRO stage."""
        return {"stages": 1, "replicas": self.world_size, "zero_stage": self.stage}

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what ZeRO cannot do as one process does it; see :meth:`EngineStrategy.check`.

        Raises:
            ConfigError: an objective that lets single blocks rest, drops some in stage 3, or trains gates in bfloat16.
        """
        super().check(trainer, module)
        if not isinstance(module, EarlyExitModule):
            return
        name = type(module.objective).__name__
        if module.objective.unreached == "blocks rest":
            raise ConfigError(
                f"The objective {name} leaves single blocks out of a step, and ZeRO steps all parameters of a group: "
                "weights and moments of these blocks would decay.",
                hint=f"Set {_PLAIN}.",
            )
        if module.objective.drops_blocks and self.stage == 3:
            raise ConfigError(
                f"The objective {name} drops blocks, each process its own, but in stage 3 of ZeRO all must call "
                "the same modules in the same order.",
                hint="Set trainer.strategy.init_args.stage=2, or leave dropout out of the objective.",
            )
        if module.objective.trains_gates and self.precision != "float32":
            raise ConfigError(
                f"The objective {name} trains gates, which stay in float32, but DeepSpeed would make all parameters "
                f"{self.precision}.",
                hint=f"Set trainer.strategy.init_args.precision=float32, or {_PLAIN} and trainer.precision=bf16-true.",
            )

    def setup(self, trainer: Trainer) -> None:
        """Give parameters their precision before a fit; see :meth:`EngineStrategy.setup`."""
        module = self.lightning_module
        assert module is not None
        if trainer.state.fn == TrainerFn.FITTING:
            self.check_types(module)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(getattr(torch, self.precision))
        super().setup(trainer)

    def build_engine(self, optimizer: Optimizer, clip_norm: float | None) -> Any:
        """The engine around the LightningModule; see :meth:`EngineStrategy.build_engine`."""
        module = self.lightning_module
        assert module is not None
        model = module.model if isinstance(module, EarlyExitModule) else None
        self._traces = Traces(module)
        self._rest = Rest.of(module, optimizer)
        sharding = {"stage3_param_persistence_threshold": self.persistence_threshold} if self.stage == 3 else {}
        config = engine_config(zero_stage=self.stage, precision=self.precision, clip_norm=clip_norm, **sharding)
        if self.stage == 3:
            self._shard(module, config)
        engine = start_engine(module, optimizer, config)
        engine.set_gradient_accumulation_boundary(False)
        if self.stage == 3 and model is not None:
            # Gates run once for each chunk of a process's tokens: those with more would wait for the others to fetch.
            self._traces.unhook(model.gates)
            for parameter in read_by_objectives(model):
                load_deepspeed().zero.register_external_parameter(module, parameter)
        return engine

    def model_to_device(self) -> None:
        """Move the module, unless its parameters will go there in shards."""
        module = self.lightning_module
        assert module is not None
        if self.stage < 3 or module.trainer.state.fn != TrainerFn.FITTING:
            super().model_to_device()

    def settle_gradients(self) -> None:
        """Leave groups at rest as they are."""
        if self._rest is not None:
            self._rest.settle(self.root_device)

    def release_engine(self) -> None:
        """Give the module back whole; see :meth:`EngineStrategy.release_engine`."""
        assert self._traces is not None
        if self._rest is not None:
            self._rest.end()
        self._traces.remove(self.engine)

    def teardown(self) -> None:
        """End the engine, and DeepSpeed's own form of linear maps with it; see :meth:`EngineStrategy.teardown`."""
        super().teardown()
        functional.linear = _LINEAR

    def _shard(self, module: nn.Module, config: dict[str, Any]) -> None:
        """Move the module to its device, cutting each parameter on the way: it may be too large for one device."""
        with quiet():
            load_deepspeed().zero.Init(module=module, config_dict_or_path=config, dtype=getattr(torch, self.precision))
        super().model_to_device()


def read_by_objectives(model: MultiExitModel) -> Iterator[Tensor]:
    """Parameters used outside the modules they belong to, or as often as the data of a process ask for."""
    _, shared = model.shared_tail()
    projections = [shared, *(model.head(layer).projection(shared) for layer in model.exit_layers)]
    found = [tensor for head in projections for tensor in (head.weight, head.bias) if tensor is not None]
    yield from {id(tensor): tensor for tensor in (*found, *model.gates.parameters())}.values()
