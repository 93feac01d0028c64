"""The configuration of a fit, read and checked as the fit itself does it, without running it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from eetrain.training.command import RunCLI
from eetrain.training.console import hush

# Objects of the Trainer, some of which reach for a network, a device or other processes when they are made.
_OBJECTS = ("logger", "callbacks", "strategy", "plugins", "profiler", "accelerator")


@dataclass(frozen=True)
class ResolvedFit:
    """Every setting of a fit.

    Attributes:
        settings: as plain data, such as ``settings["trainer"]["devices"]``.
    """

    settings: dict[str, Any]

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return Path(self.settings["run"])

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return Path(self.settings["checkpoint"]["dirpath"] or self.run / "checkpoints")

    def with_trainer(self, **settings: Any) -> ResolvedFit:
        """The same with other settings of the Trainer."""
        return ResolvedFit({**self.settings, "trainer": {**self.settings["trainer"], **settings}})

    def to_yaml(self) -> str:
        """What ``eetrain fit -c`` reads."""
        text: str = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
        return text


def resolve_fit(arguments: list[str]) -> ResolvedFit:
    """Read recipe, overlays and flags, and check them: names, types, and what model and data say of their settings.

    Args:
        arguments: of ``eetrain fit``.

    Raises:
        ConfigError: as the fit would raise it.
    """
    hush()
    cli = _ReadingCLI(["fit", *arguments])
    text = cli._parser("fit").dump(cli.config["fit"], skip_none=False)
    return ResolvedFit(yaml.safe_load(text))


class _ReadingCLI(RunCLI):
    """Reads the command line of a fit, and leaves everything as it is."""

    def instantiate_classes(self) -> None:
        """Build model and data, which check their settings and read nothing yet."""
        config = copy.deepcopy(self.config)
        for name in _OBJECTS:
            config.fit.trainer[name] = None
        self.parser.instantiate_classes(config)

    def before_instantiate_classes(self) -> None:
        """Folders stay as given."""

    def _parse_ckpt_path(self) -> None: ...

    def _set_seed(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...
