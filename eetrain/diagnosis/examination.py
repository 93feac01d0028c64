"""All checks in order, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eetrain.cluster.launch import Launch
from eetrain.diagnosis.check import Check, guarded
from eetrain.diagnosis.checkpoint_size import read_recipe
from eetrain.diagnosis.communication import communication_checks
from eetrain.diagnosis.launch import launch_checks, shown_variables
from eetrain.diagnosis.machine import machine_checks
from eetrain.diagnosis.meeting import meeting_checks
from eetrain.diagnosis.slurm_job import slurm_checks
from eetrain.diagnosis.storage import storage_checks
from eetrain.diagnosis.versions import version_checks, version_table
from eetrain.evaluation.environment import usable_cores


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        checks: in the order they were made.
        versions: of everything that can matter, ``None`` where it is not there.
        launch: how this process was started.
        variables: of launchers and communication, as far as they are set.
    """

    checks: tuple[Check, ...]
    versions: Mapping[str, str | None]
    launch: Launch
    variables: Mapping[str, str]

    @property
    def ready(self) -> bool:
        """Whether nothing is in the way of a run."""
        return all(check.state != "error" for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line: what is wrong, or what there is to compute with."""
        if not self.ready:
            wrong = dict.fromkeys(check.name for check in self.checks if check.state == "error")
            return f"not ready: {', '.join(wrong)}"
        gpus = torch.cuda.device_count()
        return f"ready: {gpus} GPU{'s' if gpus != 1 else ''}" if gpus else f"ready: no GPU, {usable_cores()} cores"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        lines = [asdict(check) for check in self.checks]
        measured = {line["name"]: line.pop("measured") for line in lines}
        return {
            "ready": self.ready,
            "verdict": self.verdict,
            "checks": lines,
            "measured": {name: numbers for name, numbers in measured.items() if numbers},
            "versions": dict(self.versions),
            "launch": asdict(self.launch),
            "variables": dict(self.variables),
        }


def examine(run: Path, recipe: Path | None, environ: Mapping[str, str]) -> Examination:
    """Examine packages, machine, launch, communication and the folder of a run, in seconds.

    Args:
        run: folder of the run; it need not be there yet.
        recipe: settings to work out the size of a checkpoint from, in the place of ``RUN/config.yaml``.
        environ: variables.
    """
    settings = read_recipe(run, recipe)
    trainer = settings.get("trainer") or {}
    groups = (
        ("versions", version_checks),
        ("machine", lambda: machine_checks(environ)),
        ("launch", lambda: launch_checks(environ, trainer.get("devices", "auto"), trainer.get("num_nodes"))),
        ("requeue", lambda: slurm_checks(environ)),
        ("meeting point", lambda: meeting_checks(environ)),
        ("communication", communication_checks),
        ("storage", lambda: storage_checks(run, settings)),
    )
    checks = tuple(check for name, look in groups for check in guarded(name, look))
    return Examination(checks, version_table(), Launch.of(environ), shown_variables(environ))
