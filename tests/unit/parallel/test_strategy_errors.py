"""Settings that a pipeline cannot follow are refused before processes meet, in words of the setting."""

import functools

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from eetrain.errors import ConfigError, TopologyError
from eetrain.exits import ExitConfig
from eetrain.objectives import Distillation, EETuning, MultiExitCrossEntropy, Objective, SkipDecode
from eetrain.parallel import PipelineStrategy
from eetrain.testing.tiny import tiny_config
from eetrain.training import EarlyExitModule
from eetrain.training.settings import BackboneConfig

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}


class Product(Objective):
    """Not a sum over depths."""

    def needs_full_depth(self):
        return True

    def __call__(self, output, labels_BT, *, step, statistics=False):
        raise AssertionError("refused before training")


class Rows(lightning.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        ids_BT = torch.ones(self.batch_size, 5, dtype=torch.long)
        return DataLoader([{"input_ids": ids_BT, "labels": ids_BT}], batch_size=None)

    predict_dataloader = train_dataloader


def module(objective=MultiExitCrossEntropy, tuning="full", exits=(1, 2), output="tied", **backbone):
    """Not built yet, as from a configuration."""
    source = {"path": "nowhere"} if "load" in backbone else {"config": tiny_config("llama").to_dict()}
    settings = BackboneConfig(**source, **backbone)
    return EarlyExitModule(settings, ExitConfig(layers=list(exits), output=output), objective(), tuning)


def refused(built, strategy=None, verb="fit", batch_size=4, **trainer):
    settings = {"stages": 1, "micro_batches": 2, **(strategy or {})}
    running = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=1, strategy=PipelineStrategy(**settings), **trainer, **QUIET
    )
    with pytest.raises((ConfigError, TopologyError)) as caught:
        getattr(running, verb)(built, datamodule=Rows(batch_size))
    assert not dist.is_initialized(), "processes have met before"
    return type(caught.value), caught.value.message, caught.value.hint


@pytest.mark.parametrize(
    ("built", "settings", "kind", "message", "hint"),
    [
        (
            module,
            {"strategy": {"stages": 2}},
            TopologyError,
            "stages=2 does not divide the 1 processes of the run.",
            "Every replica is one process a stage: set stages to one of 1, or start a multiple of 2 processes "
            "(trainer.devices times trainer.num_nodes).",
        ),
        (
            module,
            {"strategy": {"micro_batches": 3}},
            TopologyError,
            "micro_batches=3 does not divide data.batch_size=4, the rows of a replica's step.",
            "Set micro_batches to one of 1, 2, 4, or data.batch_size to a multiple of 3.",
        ),
        (
            module,
            {"precision": "bf16-true"},
            ConfigError,
            "trainer.precision=bf16-true, but PipelineStrategy sets the precision.",
            "Leave trainer.precision out and set trainer.strategy.init_args.precision=bfloat16.",
        ),
        (
            module,
            {"accumulate_grad_batches": 2},
            ConfigError,
            "trainer.accumulate_grad_batches=2, but a pipeline cuts each batch itself.",
            "Leave it out; set data.batch_size to the rows of a whole step, and micro_batches of the strategy.",
        ),
        (
            module,
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            ConfigError,
            "trainer.gradient_clip_algorithm=value, but PipelineStrategy clips by the norm of all gradients.",
            "Set trainer.gradient_clip_algorithm=norm, or leave it out.",
        ),
        (
            module,
            {"verb": "predict"},
            ConfigError,
            "predict generates token by token, which a training pipeline cannot.",
            "Export the checkpoint and use eetrain generate, or predict without trainer.strategy.",
        ),
        (
            functools.partial(module, EETuning, "frozen", load="exits"),
            {},
            ConfigError,
            "model.backbone.load=exits leaves out the last blocks, but a pipeline has them on its last stages.",
            "Leave it out: every process keeps its own stage only.",
        ),
        (
            functools.partial(module, dtype="float64"),
            {},
            ConfigError,
            "model.backbone.dtype=float64, which DeepSpeed does not add up over processes.",
            "Use float32, or trainer.strategy.init_args.precision=bfloat16.",
        ),
        (
            functools.partial(module, Product),
            {},
            ConfigError,
            "The objective Product cannot run in a pipeline: its loss is no weighted sum over depths, so stages cannot "
            "add their parts.",
            "Use a strategy without stages (ddp, or eetrain.parallel.ZeroStrategy), or derive the objective from "
            "eetrain.objectives.weighted_sum.WeightedSum.",
        ),
        (
            functools.partial(module, lambda: EETuning(distillation=Distillation()), "frozen", output="own"),
            {},
            ConfigError,
            "The objective EETuning distils exits from the full depth, and with model.exits.output=own the stages of a "
            "pipeline lack the backbone's output matrix, which makes a distribution of the full depth's features.",
            "Set model.exits.output=tied, or use a strategy without stages (ddp, or eetrain.parallel.ZeroStrategy).",
        ),
        (
            functools.partial(module, lambda: SkipDecode("static:3", prompt_tokens=2), exits=()),
            {"strategy": {"zero_stage": 1}},
            ConfigError,
            "The objective SkipDecode leaves single blocks out of a step, and with zero_stage=1 and precision=float32 "
            "DeepSpeed steps all parameters of a group: weights and moments of these blocks would decay.",
            "Set trainer.strategy.init_args.zero_stage=0 and precision=float32.",
        ),
        (
            functools.partial(module, lambda: SkipDecode("static:3", prompt_tokens=2), exits=()),
            {"strategy": {"precision": "bfloat16"}},
            ConfigError,
            "The objective SkipDecode leaves single blocks out of a step, and with zero_stage=0 and precision=bfloat16 "
            "DeepSpeed steps all parameters of a group: weights and moments of these blocks would decay.",
            "Set trainer.strategy.init_args.zero_stage=0 and precision=float32.",
        ),
        (
            BoringModel,
            {},
            ConfigError,
            "PipelineStrategy cuts an EarlyExitModule, and the module is a BoringModel.",
            "Use eetrain.training.EarlyExitModule.",
        ),
    ],
)
def test_settings_that_do_not_go_with_a_pipeline(built, settings, kind, message, hint):
    assert refused(built(), **settings) == (kind, message, hint)


@pytest.mark.parametrize(
    ("arguments", "kind", "message", "hint"),
    [
        (
            {"zero_stage": 2},
            TopologyError,
            "trainer.strategy.init_args.zero_stage=2, but a pipeline keeps whole gradients and parameters between "
            "micro-batches.",
            "Set it to 0 or 1, or use eetrain.parallel.ZeroStrategy without stages.",
        ),
        (
            {"zero_stage": 3},
            TopologyError,
            "trainer.strategy.init_args.zero_stage=3, but a pipeline keeps whole gradients and parameters between "
            "micro-batches.",
            "Set it to 0 or 1, or use eetrain.parallel.ZeroStrategy without stages.",
        ),
        ({"stages": 0}, TopologyError, "stages=0, but a pipeline has at least one.", "Set it to 1 or more."),
        (
            {"micro_batches": 0},
            TopologyError,
            "micro_batches=0.",
            "Set it to 1 or more; 4 times the stages is usual.",
        ),
        (
            {"precision": "16-mixed"},
            ConfigError,
            "trainer.strategy.init_args.precision='16-mixed' is not known.",
            "One of: float32, bfloat16.",
        ),
    ],
)
def test_arguments_out_of_their_range(arguments, kind, message, hint):
    with pytest.raises((ConfigError, TopologyError)) as caught:
        PipelineStrategy(**arguments)
    assert (type(caught.value), caught.value.message, caught.value.hint) == (kind, message, hint)
