"""`eetrain doctor`: is this machine ready for a run, and what is in the way."""

from __future__ import annotations

import os
from pathlib import Path

from eetrain.cluster.launch import Launch
from eetrain.commands.output import print_json, print_table
from eetrain.diagnosis.examination import examine
from eetrain.errors import ConfigError


def doctor(run: str = ".", recipe: str | None = None, json: bool = False) -> int:
    """Examine versions, machine, launch, communication and the run folder; the verdict is the first line.

    Inside a job, by srun or torchrun, one process of each node reports.

    Args:
        run: folder of the run, which need not be there yet; by default the working folder.
        recipe: YAML file to work out the size of a checkpoint from; by default config.yaml of the run folder.
        json: write one JSON object.
    """
    if recipe is not None and not Path(recipe).is_file():
        raise ConfigError(f"There is no file {recipe!r}.", hint="Give the YAML file of a run by --recipe.")
    launch = Launch.of()
    if launch.launcher != "plain" and launch.local_rank > 0:
        return 0
    found = examine(Path(run), None if recipe is None else Path(recipe), os.environ)
    if json:
        print_json(found.to_dict())
    else:
        rows = [[check.name, check.found, check.state, check.hint] for check in found.checks]
        where = f" on {os.uname().nodename}" if launch.nodes > 1 else ""
        print_table(found.verdict + where, ("what", "found", "state", "hint"), rows, left=4)
    return 0 if found.ready else 1
