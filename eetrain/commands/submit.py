"""`eetrain submit`: a fit, or an array of evaluations, as a Slurm job."""

from __future__ import annotations

import difflib
import inspect
import shlex
import sys
from pathlib import Path
from typing import Any

from eetrain.cluster.batch_script import Resources
from eetrain.cluster.site import Site, read_site
from eetrain.cluster.submission import check, required_sbatch, sbatch_command
from eetrain.cluster.submission import submit as hand_in
from eetrain.commands.output import print_json
from eetrain.commands.submit_jobs import EVALUATE, TRAIN, PreparedJob, prepare_array, prepare_fit, template_text
from eetrain.errors import ConfigError
from eetrain.training.placing import move_into_place, part_of, reason_of, sync


def submit(
    recipe: str,
    nodes: int = 1,
    gpus: int = 1,
    time: str = "24:00:00",
    site: str | None = None,
    run: str | None = None,
    array: str | list[str] | None = None,
    template: str | None = None,
    dry_run: bool = False,
    json: bool = False,
    settings: list[str] | None = None,
) -> int:
    """Submit a fit to Slurm. It is told to save before its time is over, goes back into the queue and goes on.

    RUN/slurm keeps the script, the resolved configuration and the logs.

    Args:
        recipe: as for `eetrain fit -c`; with --array a YAML with settings of `eetrain evaluate`.
        nodes: machines.
        gpus: devices of each machine, with one process each; also where the site has no GPUs.
        time: limit after which the job is requeued, as minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.
        site: YAML with what the cluster wants said: partition, modules, caches; slurm/site.yaml is an example.
        run: folder of the run; by default that of the recipe. With --array the folder of the reports.
        array: policies such as never,always:6,threshold:0.9, each evaluated by a task of its own.
        template: a batch script instead of slurm/train.sbatch or slurm/eval_array.sbatch.
        dry_run: show the script and let Slurm check it, if there is one; write and submit nothing.
        json: write one JSON object.
        settings: further -c OVERLAY and --KEY VALUE of `eetrain fit`, given as they are. They are checked before
            anything is queued.
    """
    settings = settings or []
    _check_spelling(settings)
    command = sbatch_command() if dry_run else required_sbatch()
    if not Path(recipe).is_file():
        raise ConfigError(f"There is no recipe {recipe!r}.", hint="`eetrain ls` lists the recipes.")
    resources, cluster = Resources(nodes, gpus, time), Site() if site is None else read_site(site)
    text = template_text(template, TRAIN if array is None else EVALUATE)
    if array is None:
        job = prepare_fit(recipe, settings, run, resources, cluster, text)
    else:
        job = prepare_array(recipe, settings, array, run, resources, cluster, text)
    unchecked = "there is no sbatch here" if command is None else check(command, job.script)
    if dry_run:
        _show_dry(job, unchecked, json)
        return 0
    assert command is not None
    if unchecked is not None:
        raise ConfigError(f"Nothing can be submitted: {unchecked}.", hint="Is this a login node? Try `sinfo`.")
    script = _write(job)
    _show(job, hand_in(command, script), json)
    return 0


def _check_spelling(settings: list[str]) -> None:
    """A misspelt flag of this verb would else be called an unknown setting of the fit."""
    own = [name for name in inspect.signature(submit).parameters if name not in ("recipe", "settings")]
    for word in settings:
        name = word.partition("=")[0].removeprefix("--")
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
        if close and word.startswith("--") and "." not in name:
            raise ConfigError(f"there is no setting {name!r}.", hint=f"Did you mean --{close[0].replace('_', '-')}?")


def _write(job: PreparedJob) -> Path:
    """Write what the job needs; Slurm does not create the folder of its log, and does not say so."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("config.yaml", job.config), ("job.sbatch", job.script)):
            part = part_of(job.folder / name)
            part.write_text(text, encoding="utf-8")
            sync(part)
            move_into_place(part, job.folder / name)
    except OSError as error:
        raise ConfigError(
            f"The job cannot be written to {job.folder}: {reason_of(error)}.", hint="Set another folder by --run."
        ) from error
    return job.folder / "job.sbatch"


def _show(job: PreparedJob, number: str, json: bool) -> None:
    shown: dict[str, Any] = {
        **_places(job, number),
        "watch": f"squeue -j {number}",
        "cancel": f"scancel {number}",
        "compare": compare_command(job) if job.reports else None,
    }
    if json:
        print_json({**shown, "notes": list(job.notes)})
        return
    _tell(job.notes)
    sys.stdout.write("".join(f"{name:<9}{value}\n" for name, value in shown.items() if value is not None))


def _show_dry(job: PreparedJob, unchecked: str | None, json: bool) -> None:
    if json:
        found = {"text": job.script, "checked": unchecked is None, "notes": list(job.notes)}
        print_json({**_places(job, None), **found})
        return
    verdict = "sbatch --test-only takes it" if unchecked is None else f"not checked by Slurm: {unchecked}"
    _tell((*job.notes, f"{verdict}; nothing is written or submitted."))
    sys.stdout.write(job.script)


def _places(job: PreparedJob, number: str | None) -> dict[str, str | None]:
    return {
        "job": number,
        "log": str(job.folder / job.log.format(job=number or "JOB")),
        "script": str(job.folder / "job.sbatch"),
        "config": str(job.folder / "config.yaml"),
    }


def compare_command(job: PreparedJob) -> str:
    """The command that puts the reports of an array together."""
    reports = [f"{folder.name}={folder}" for folder in job.reports]
    return shlex.join(["eetrain", "compare", *reports])


def _tell(notes: tuple[str, ...]) -> None:
    sys.stderr.write("".join(f"note: {note}\n" for note in notes))
