"""What a pipeline cannot do as one process does it: refused before training starts, on every process."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from eetrain.backbones.routers import has_routers
from eetrain.errors import ConfigError
from eetrain.exits import MultiExitModel
from eetrain.objectives import JointGating
from eetrain.objectives.weighted_sum import WeightedSum, distils
from eetrain.parallel.deepspeed_setup import EnginePrecision
from eetrain.training import EarlyExitModule


def check_run(trainer: Trainer, module: LightningModule, zero_stage: int, precision: EnginePrecision) -> None:
    """Refuse settings of Trainer and module; nothing is built yet.

    Args:
        trainer: of the run.
        module: what is to be cut.
        zero_stage: of the strategy.
        precision: of the strategy.

    Raises:
        ConfigError: names the setting.
    """
    if not isinstance(module, EarlyExitModule):
        raise ConfigError(
            f"PipelineStrategy cuts an EarlyExitModule, and the module is a {type(module).__name__}.",
            hint="Use eetrain.training.EarlyExitModule.",
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}, but a pipeline cuts each batch "
            "itself.",
            hint="Leave it out; set data.batch_size to the rows of a whole step, and micro_batches of the strategy.",
        )
    if trainer.state.fn == TrainerFn.PREDICTING:
        raise ConfigError(
            "predict generates token by token, which a training pipeline cannot.",
            hint="Export the checkpoint and use eetrain generate, or predict without trainer.strategy.",
        )
    if module.settings.backbone.load == "exits":
        raise ConfigError(
            "model.backbone.load=exits leaves out the last blocks, but a pipeline has them on its last stages.",
            hint="Leave it out: every process keeps its own stage only.",
        )
    if module.settings.backbone.dtype == "float64":
        raise ConfigError(
            "model.backbone.dtype=float64, which DeepSpeed does not add up over processes.",
            hint="Use float32, or trainer.strategy.init_args.precision=bfloat16.",
        )
    objective = module.objective
    if not isinstance(objective, JointGating | WeightedSum):
        raise ConfigError(
            f"The objective {type(objective).__name__} cannot run in a pipeline: its loss is no weighted sum over "
            "depths, so stages cannot add their parts.",
            hint="Use a strategy without stages (ddp, or eetrain.parallel.ZeroStrategy), or derive the objective from "
            "eetrain.objectives.weighted_sum.WeightedSum.",
        )
    if distils(objective) and module.settings.exits.output == "own":
        raise ConfigError(
            f"The objective {type(objective).__name__} distils exits from the full depth, and with "
            "model.exits.output=own the stages of a pipeline lack the backbone's output matrix, which makes a "
            "distribution of the full depth's features.",
            hint="Set model.exits.output=tied, or use a strategy without stages (ddp, or "
            "eetrain.parallel.ZeroStrategy).",
        )
    if objective.unreached == "blocks rest" and (zero_stage or precision != "float32"):
        raise ConfigError(
            f"The objective {type(objective).__name__} leaves single blocks out of a step, and with "
            f"zero_stage={zero_stage} and precision={precision} DeepSpeed steps all parameters of a group: weights and "
            "moments of these blocks would decay.",
            hint="Set trainer.strategy.init_args.zero_stage=0 and precision=float32.",
        )


def check_routers(module: EarlyExitModule, model: MultiExitModel) -> None:
    """Refuse the loss of routers.

    Raises:
        ConfigError: the run has one.
    """
    if module.router_loss and module.settings.tuning != "frozen" and has_routers(model.backbone):
        raise ConfigError(
            "The auxiliary loss of a mixture of experts is a product of sums over all blocks, which the stages of a "
            "pipeline cannot add up.",
            hint="Set model.router_loss=false, or use a strategy without stages.",
        )
