"""The verbs that run a Trainer: LightningCLI with eetrain's model, data and run folder."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import uuid
from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed import DistNetworkError

from eetrain.cli_errors import explain
from eetrain.cluster.launch import Launch, check_launch
from eetrain.cluster.signals import Stopped
from eetrain.data import CausalLMDataModule
from eetrain.errors import ConfigError, TopologyError
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.building import vocabulary_size
from eetrain.training.checkpoint_fallback import newest_checkpoint
from eetrain.training.checkpoint_reading import read_trainer_state
from eetrain.training.console import ExitTable, hush
from eetrain.training.csv_log import LogBeforeSaving
from eetrain.training.guard import NumberGuard
from eetrain.training.module import EarlyExitModule
from eetrain.training.placing import move_into_place, part_of, standing, sync
from eetrain.training.predictions import WritePredictions
from eetrain.training.run_folder import CONFIG_FILE, check_same_run, start_from
from eetrain.training.run_lock import RunLock
from eetrain.training.stopping import SaveBeforeStopping
from eetrain.training.watching import WatchProcesses

CSV = {"class_path": "eetrain.training.csv_log.MetricsCSV", "init_args": {"save_dir": ".", "name": "metrics"}}
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
            target = Path(trainer.default_root_dir) / CONFIG_FILE
            target.parent.mkdir(parents=True, exist_ok=True)
            part = part_of(target)
            part.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")
            sync(part)
            move_into_place(part, target)


class RunCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``; parses and runs on construction.

    Args:
        args: command line after the program's name; that of the process if left out.
    """

    config: Any
    lock: RunLock | None = None

    def __init__(self, args: list[str] | None = None) -> None:
        self.metrics: dict[str, float] = {}
        try:
            self._parse_and_run(args)
        finally:
            if self.lock is not None:
                self.lock.release()

    def _parse_and_run(self, args: list[str] | None) -> None:
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
        parser.add_argument(
            "--resume",
            type=Literal["never", "auto"],
            default="never",
            help="fit: auto goes on from the newest whole checkpoint of the run folder, and begins if there is none; "
            "the same command may be given any number of times.",
        )
        parser.add_argument("--json", action="store_true", help="Print one JSON object with the metrics on stdout.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(NumberGuard, "guard")
        parser.set_defaults({**_CHECKPOINT_DEFAULTS, "model.objective": OBJECTIVE})

    def before_instantiate_classes(self) -> None:
        """Put everything that has no folder yet into the run folder."""
        config, folder = self.config[self.config.subcommand], str(self.run_folder)
        self.save_config_kwargs["as_given"] = _for_another_run(config)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = folder
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = f"{folder}/checkpoints"
        check_launch(config.trainer.devices, config.trainer.num_nodes)
        self._choose_checkpoint(config)
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if hasattr(logger, "class_path"):
                _place_logger(logger, self.run_folder, self.subcommand)
        if "verbose" in config:
            config.verbose = False  # the table of exits shows the same numbers

    def _choose_checkpoint(self, config: Any) -> None:
        """Which one to begin with; a fit first takes the run folder for itself."""
        checkpoints = Path(config.checkpoint.dirpath)
        if self.subcommand != "fit":
            if config.ckpt_path == "last" and (newest := newest_checkpoint(checkpoints)) is not None:
                config.ckpt_path = str(newest)
            return
        if Launch.of().rank == 0:
            self.lock = RunLock(self.run_folder)
        given = self.save_config_kwargs["as_given"]
        if not config.trainer.fast_dev_run:
            check_same_run(
                self.run_folder, checkpoints, yaml.safe_load(self._parser("fit").dump(given, skip_none=False))
            )
            config.ckpt_path = start_from(self.run_folder, checkpoints, config.resume, config.ckpt_path)

    def instantiate_classes(self) -> None:
        """Build model, data and Trainer, and tell the data how many tokens the model knows."""
        super().instantiate_classes()
        if self.datamodule.vocab_size is None:
            self.datamodule.vocab_size = vocabulary_size(self.model.settings.backbone)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add eetrain's callbacks and atomic checkpoint files."""
        config = self._get(self.config_init, "trainer")
        given = config.callbacks or []
        given = given if isinstance(given, list) else [given]
        callbacks = [WatchProcesses(), *given, ExitTable(), WritePredictions(self.run_folder)]
        if config.fast_dev_run:
            config.enable_checkpointing = False
        callbacks.append(LogBeforeSaving())
        callbacks.append(SaveBeforeStopping(Path(self._get(self.config, "checkpoint").dirpath)))
        if config.enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        if config.enable_progress_bar is not False and sys.stderr.isatty():
            callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
        else:
            config.enable_progress_bar = False
        config.callbacks = callbacks
        trainer = super().instantiate_trainer(**kwargs)
        # What a batch has to say of itself comes before the run is stopped after it.
        trainer.callbacks.sort(key=lambda each: 2 * isinstance(each, Checkpoint) + isinstance(each, SaveBeforeStopping))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO(resuming=self.subcommand == "fit")
        return trainer

    def after_fit(self) -> None:
        """Validate what was trained, if the fit did not end with a validation."""
        trainer = self.trainer
        if (
            self.model.scored_at != trainer.global_step
            and trainer.limit_val_batches
            and self.datamodule.corpus.has("validation")
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
    try:
        RunCLI(args)
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR', 'this machine')}:{os.environ.get('MASTER_PORT', '?')}"
        raise TopologyError(
            f"The port at which the processes meet, {place}, is taken.",
            hint="Set MASTER_PORT to a free one; another job of this machine may use it.",
        ) from error
    except Stopped:
        _end_processes(args)
        raise
    _end_processes(args)


def _end_processes(args: list[str] | None) -> None:
    """Take the process group down where this process ends next: gloo's threads can abort an interpreter that exits."""
    if args is None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _plain(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}


def _for_another_run(config: Any) -> Any:
    """The configuration as the user gave it, without what belongs to one call."""
    copied = copy.deepcopy(config)
    copied.ckpt_path, copied.json, copied.resume = None, False, "never"
    return copied


def _place_logger(logger: Any, folder: Path, verb: str) -> None:
    arguments = logger.init_args
    if logger.class_path.endswith("MetricsCSV") and verb != "fit":
        arguments["name"] = verb  # the log of the fit stays as it is
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
