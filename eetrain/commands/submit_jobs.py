"""The two kinds of job that `eetrain submit` writes: a fit, and an array of evaluations."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import auto_parser

import eetrain
from eetrain.cli_errors import explain
from eetrain.cluster.batch_script import (
    Resources,
    folder_options,
    quoted,
    render,
    seconds,
    signal_option,
    site_options,
    site_settings,
)
from eetrain.cluster.site import Site
from eetrain.commands.evaluate import evaluate
from eetrain.commands.policies import split_policies
from eetrain.decoding import parse_policy
from eetrain.errors import ConfigError
from eetrain.planning.topology import Topology
from eetrain.training.resolving import ResolvedFit, resolve_fit
from eetrain.training.run_folder import check_same_run

TRAIN, EVALUATE = "train.sbatch", "eval_array.sbatch"


@dataclass(frozen=True)
class PreparedJob:
    """A job that is checked and only has to be written and submitted.

    Attributes:
        folder: gets ``config.yaml``, ``job.sbatch`` and the logs.
        config: text of the configuration.
        script: text of the batch script.
        log: the log's name, with ``{job}`` for the job's number.
        notes: what the user should know.
        reports: folders of the reports, for an array.
    """

    folder: Path
    config: str
    script: str
    log: str
    notes: tuple[str, ...] = ()
    reports: tuple[Path, ...] = ()


def template_text(given: str | None, name: str) -> str:
    """The text of a template.

    Args:
        given: a file, or ``None`` for that of the repository.
        name: of the repository's.

    Raises:
        ConfigError: it is not there.
    """
    path = Path(eetrain.__file__).resolve().parent.parent / "slurm" / name if given is None else Path(given)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if given is None:
            failed = ConfigError(
                f"eetrain is installed without its template slurm/{name}.",
                hint="It comes with the repository, not with the package: clone it and run `pip install -e .` in it, "
                "or name a copy by --template.",
            )
        else:
            failed = ConfigError(f"The template {given!r} cannot be read: {error}.", hint="Name a file by --template.")
        raise failed from error


def prepare_fit(
    recipe: str, settings: list[str], run: str | None, resources: Resources, site: Site, template: str
) -> PreparedJob:
    """A job that trains, and goes on by itself until it is done.

    Args:
        recipe: YAML of the fit.
        settings: further arguments of the fit.
        run: folder of the run; that of the recipe if left out.
        resources: nodes, devices, time.
        site: the cluster.
        template: text of the script's template.

    Raises:
        ConfigError: the fit would refuse its settings, or the folder holds another run.
        TopologyError: the stages of its pipeline do not divide the devices.
    """
    fit = resolve_fit(["-c", recipe, *settings, *([] if run is None else ["--run", run])])
    notes = _contradictions(fit, resources)
    _check_stages(fit, resources)
    check_same_run(fit.run, fit.checkpoints, fit.settings)
    fit = fit.with_trainer(devices=resources.devices, num_nodes=resources.nodes)
    if seconds(resources.time) == 0:
        notes += ("--time 0 is no limit, so no signal to save comes before the end.",)
    lines = [f"config={quoted(_place(fit.run) / 'config.yaml')}", f"run={quoted(fit.run.absolute())}"]
    options = {"signal": signal_option(site, resources)}
    return _prepared(fit.run, fit.to_yaml(), "%j.log", lines, options, resources, site, template, notes)


def prepare_array(
    recipe: str,
    settings: list[str],
    policies: str | list[str],
    out: str | None,
    resources: Resources,
    site: Site,
    template: str,
) -> PreparedJob:
    """An array job that evaluates one policy in each of its tasks.

    Args:
        recipe: YAML with settings of `eetrain evaluate`.
        settings: further arguments of it.
        policies: as for `eetrain evaluate`.
        out: folder of the report folders; ``out`` of the recipe if left out.
        resources: one node, one device, and the time of each task.
        site: the cluster.
        template: text of the script's template.

    Raises:
        ConfigError: no policy, a policy that is none, several devices, or settings that evaluate would refuse.
    """
    chosen = [policy for policy in split_policies(policies) if policy]
    if not chosen:
        raise ConfigError("--array names no policy: an array over nothing.", hint="For example --array never,always:6.")
    for policy in chosen:
        parse_policy(policy)
    if resources.nodes * resources.devices > 1:
        raise ConfigError(
            f"--nodes {resources.nodes} --gpus {resources.devices}, but an evaluation is one process on one device.",
            hint="Leave both out; each policy is a task of its own.",
        )
    evaluation = _evaluation(recipe, settings)
    stored = evaluation.pop("out", None)
    out = stored if out is None else out
    if out is None:
        raise ConfigError("There is no folder for the reports.", hint="Set --run FOLDER, or out in the recipe.")
    folder = Path(out)
    lines = [
        f"config={quoted(_place(folder) / 'config.yaml')}",
        f"out={quoted(folder.absolute())}",
        f"policies=({' '.join(map(quoted, chosen))})",
    ]
    reports = tuple(folder / f"{number}-{_safe(policy)}" for number, policy in enumerate(chosen))
    options = {"array": f"0-{len(chosen) - 1}"}
    text = yaml.safe_dump(evaluation, sort_keys=False, allow_unicode=True)
    return _prepared(folder, text, "%A_%a.log", lines, options, resources, site, template, reports=reports)


def _prepared(
    run: Path,
    config: str,
    log: str,
    lines: list[str],
    more: dict[str, str],
    resources: Resources,
    site: Site,
    template: str,
    notes: tuple[str, ...] = (),
    reports: tuple[Path, ...] = (),
) -> PreparedJob:
    folder = _place(run)
    options: dict[str, str | None] = {
        "job-name": f"eetrain-{_safe(run.absolute().name)}",
        **site_options(site, resources),
        **more,
        **folder_options(folder, log, Path.cwd()),
    }
    script = render(template, options, [*site_settings(site), *lines])
    name = log.replace("%j", "{job}").replace("%A_%a", "{job}_*")
    return PreparedJob(folder, config, script, name, notes, reports)


def _place(run: Path) -> Path:
    """Where a run keeps what belongs to its jobs."""
    return run.absolute() / "slurm"


def _safe(text: str) -> str:
    """As the template of arrays does it, too."""
    return re.sub(r"[^A-Za-z0-9._]", "-", text)


def _contradictions(fit: ResolvedFit, resources: Resources) -> tuple[str, ...]:
    trainer = fit.settings["trainer"]
    given = {"devices": ("--gpus", resources.devices), "num_nodes": ("--nodes", resources.nodes)}
    return tuple(
        f"trainer.{key}={trainer[key]} of the recipe gives way to {flag} {count}."
        for key, (flag, count) in given.items()
        if str(trainer[key]) not in (str(count), "auto", "1" if key == "num_nodes" else "-1")
    )


def _check_stages(fit: ResolvedFit, resources: Resources) -> None:
    strategy = fit.settings["trainer"]["strategy"]
    stages = strategy.get("init_args", {}).get("stages") if isinstance(strategy, dict) else None
    if isinstance(stages, int):
        Topology.of(resources.nodes * resources.devices, stages, max(stages, 1))


def _evaluation(recipe: str, settings: list[str]) -> dict[str, Any]:
    """The settings of `eetrain evaluate`, without those that every task has of its own."""
    parser = auto_parser(evaluate, as_positional=False, exit_on_error=False)
    try:
        config = parser.parse_args(["--config", recipe, *settings])
    except ArgumentError as error:
        known = list(inspect.signature(evaluate).parameters)
        message, hint = explain(str(error), "evaluate", known)
        raise ConfigError(message, hint=hint) from error
    found: dict[str, Any] = yaml.safe_load(parser.dump(config))
    if found.get("data") is None:
        raise ConfigError("There is no data to evaluate on.", hint="Set data in the recipe, or --data FILE.")
    return {key: value for key, value in found.items() if key not in ("policies", "json", "config")}
