"""The verbs that run a Trainer: LightningCLI with eetrain's model, data and run folder."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import uuid
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from eetrain.cli_errors import explain
from eetrain.data import CausalLMDataModule
from eetrain.errors import ConfigError
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.building import vocabulary_size
from eetrain.training.checkpoint_fallback import last_checkpoint
from eetrain.training.checkpoint_reading import read_trainer_state
from eetrain.training.console import ExitTable, hush
from eetrain.training.module import EarlyExitModule
from eetrain.training.placing import standing
from eetrain.training.predictions import WritePredictions
from eetrain.training.stopping import SaveBeforeStopping

CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": ".", "name": "metrics"}}
OBJECTIVE = {"class_path": "eetrain.objectives.MultiExitCrossEntropy"}
_CHECKPOINT_DEFAULTS = {
    "checkpoint.save_last": True,
    "checkpoint.save_top_k": 0,
    "checkpoint.enable_version_counter": False,
}


class SaveRunConfig(SaveConfigCallback):
    """Write the configuration of a fit to ``config.yaml`` in the run folder.

    Args:
        *args: see Lightning's class.
        as_given: the configuration to write instead of Lightning's: before folders were filled in, so that the file can
            be used with another run folder.
        **kwargs: see Lightning's class.
    """

    def __init__(self, *args: Any, as_given: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = as_given

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it; other verbs leave the fit's configuration alone."""
        if stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / self.config_filename, skip_none=False, overwrite=True)


class RunCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``; parses and runs on construction.

    Args:
        args: command line after the program's name; that of the process if left out.
    """

    config: Any

    def __init__(self, args: list[str] | None = None) -> None:
        self.metrics: dict[str, float] = {}
        super().__init__(
            EarlyExitModule,
            CausalLMDataModule,
            args=args,
            seed_everything_default=0,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            trainer_defaults={
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "logger": CSV,
                "log_every_n_steps": 10,
            },
            parser_kwargs={verb: {"exit_on_error": False} for verb in self.subcommands()} | {"exit_on_error": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @property
    def run_folder(self) -> Path:
        """Where checkpoints, logs, the configuration and predictions go."""
        return Path(self._get(self.config, "run"))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in our words what is wrong with the command line or its files.

        Raises:
            ConfigError: names the setting, and the closest one if it is unknown.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            verb = (sys.argv[1:] if args is None else args)[0]
            known = [action.dest for action in self._subcommand_parsers[verb]._actions]
            message, hint = explain(str(error), verb, known)
            raise ConfigError(message, hint=hint) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder, checkpoints and machine-readable output."""
        parser.add_argument("--run", type=str, default="runs/default", help="Folder of this run.")
        parser.add_argument("--json", action="store_true", help="Print one JSON object with the metrics on stdout.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({**_CHECKPOINT_DEFAULTS, "model.objective": OBJECTIVE})

    def before_instantiate_classes(self) -> None:
        """Put everything that has no folder yet into the run folder."""
        config, folder = self.config[self.config.subcommand], str(self.run_folder)
        self.save_config_kwargs["as_given"] = _for_another_run(config)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = folder
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = f"{folder}/checkpoints"
        if config.ckpt_path == "last" and (found := last_checkpoint(config.checkpoint.dirpath)) is not None:
            config.ckpt_path = str(found)
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if hasattr(logger, "class_path"):
                _place_logger(logger, self.run_folder)
        if "verbose" in config:
            config.verbose = False  # the table of exits shows the same numbers

    def instantiate_classes(self) -> None:
        """Build model, data and Trainer, and tell the data how many tokens the model knows."""
        super().instantiate_classes()
        if self.datamodule.vocab_size is None:
            self.datamodule.vocab_size = vocabulary_size(self.model.settings.backbone)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add eetrain's callbacks and atomic checkpoint files."""
        config = self._get(self.config_init, "trainer")
        given = config.callbacks or []
        callbacks = [*(given if isinstance(given, list) else [given]), ExitTable(), WritePredictions(self.run_folder)]
        if config.fast_dev_run:
            config.enable_checkpointing = False
        if config.enable_checkpointing is not False:
            callbacks.append(SaveBeforeStopping(Path(self._get(self.config, "checkpoint").dirpath)))
        else:
            self._parser(self.subcommand).callback_keys.clear()
        if config.enable_progress_bar is not False and sys.stderr.isatty():
            callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
        else:
            config.enable_progress_bar = False
        config.callbacks = callbacks
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO(resuming=self.subcommand == "fit")
        return trainer

    def after_fit(self) -> None:
        """Validate what was trained, if the fit did not end with a validation."""
        trainer = self.trainer
        if (
            self.model.scored_at != trainer.global_step
            and trainer.limit_val_batches
            and len(trainer.val_dataloaders or [])
        ):
            self.metrics = _plain(trainer)
            trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def _run_subcommand(self, subcommand: str) -> None:
        super()._run_subcommand(subcommand)
        if self._get(self.config, "json") and self.trainer.is_global_zero:
            self.metrics |= _plain(self.trainer)
            sys.stdout.write(json.dumps({"run": str(self.run_folder), "metrics": self.metrics}) + "\n")

    def _parse_ckpt_path(self) -> None:
        # Evaluation takes the model's settings from the checkpoint; a fit has its own, which the checkpoint must fit.
        verb = self.config.subcommand
        path = self.config[verb].ckpt_path
        if verb != "fit" and path is not None and standing(Path(path)).exists():
            settings = read_trainer_state(path).get("hyper_parameters", {})
            self.config = self.parser.parse_object({verb: {"model": settings}}, self.config)


def run(args: list[str] | None = None) -> None:
    """Run one of the four verbs.

    Args:
        args: the verb and its settings; those of the process if left out.
    """
    hush()
    RunCLI(args)


def _plain(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}


def _for_another_run(config: Any) -> Any:
    """The configuration as the user gave it, without what belongs to one call."""
    copied = copy.deepcopy(config)
    copied.ckpt_path, copied.json = None, False
    return copied


def _place_logger(logger: Any, folder: Path) -> None:
    arguments = logger.init_args
    if arguments.get("save_dir") in (None, "."):
        arguments["save_dir"] = str(folder)
    if logger.class_path.endswith("WandbLogger"):
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("The logger needs wandb, which is not installed.", hint="pip install 'eetrain[wandb]'")
        if arguments.get("id") is None:
            arguments["id"] = wandb_id(folder)
        Path(arguments["save_dir"]).mkdir(parents=True, exist_ok=True)


def wandb_id(folder: Path) -> str:
    """The W&B run id of a run folder, drawn once: a requeued job continues the same W&B run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wandb_id"
    try:
        with open(path, "x") as file:
            file.write(uuid.uuid4().hex[:12])
    except FileExistsError:
        pass
    return path.read_text().strip()
