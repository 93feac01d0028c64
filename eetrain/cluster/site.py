"""The site file: what a cluster wants said in every job, and nothing of the model.

Values of ``environment``, ``caches``, ``python`` and ``container`` may name variables of the job, such as
``$SCRATCH/$USER``; the job's shell fills them in. Nothing else is expanded, ``#SBATCH`` lines least of all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml  # type: ignore[import-untyped]

from eetrain.cluster.secrets import refuse_secrets
from eetrain.errors import ConfigError

GpuRequest = Literal["gpus-per-node", "gres", "none"]


@dataclass(frozen=True)
class Container:
    """An apptainer image that the tasks run in.

    Args:
        image: a ``.sif`` file, with eetrain installed in it.
        binds: folders to see inside, as ``apptainer --bind`` takes them.
    """

    image: str
    binds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A cluster, as its users know it.

    Args:
        partition: ``--partition``; left out, like the next three, if not set.
        account: ``--account``.
        qos: ``--qos``.
        constraint: ``--constraint``.
        gpu_request: how GPUs are asked for: ``gpus-per-node``, ``gres``, or ``none`` on a cluster without.
        gpu_type: their type as the cluster calls it, such as ``a100``.
        cpus_per_task: CPUs of each task, which is one device; also the threads of torch.
        memory: of each node, such as ``480G``; ``"0"`` for all of it.
        signal_seconds: how long before the end of its time a job is told to save.
        modules: loaded with ``module load``, in this order.
        setup: further lines of bash, such as ``source venv/bin/activate``.
        environment: variables of the job.
        caches: a folder for what Hugging Face downloads and what kernels are compiled to.
        container: an apptainer image.
        python: the interpreter, in the container if there is one.
        sbatch: further options, such as ``--exclusive``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_request: GpuRequest = "gpus-per-node"
    gpu_type: str | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    signal_seconds: int = 180
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    caches: str | None = None
    container: Container | None = None
    python: str = "python"
    sbatch: tuple[str, ...] = ()


def read_site(path: str | Path) -> Site:
    """Read a site file, YAML with the fields of :class:`Site`.

    Raises:
        ConfigError: the file is not there or no YAML; a key is unknown, a value is of the wrong kind, holds what looks
            like a secret, or cannot stand in an ``#SBATCH`` line.
    """
    path = Path(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(
            f"The site file {str(path)!r} cannot be read: {reason}.",
            hint="Start from slurm/site.yaml of the repository and name your copy by --site.",
        ) from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" in line {place.line + 1}" if place is not None else ""
        raise ConfigError(
            f"The site file {path} is no YAML{where}.", hint="Write lines such as 'partition: gpu'."
        ) from (
            None  # the parser quotes the line, which may hold a secret
        )
    site = Site(**_read(found if found is not None else {}, _KEYS, str(path)))
    refuse_secrets(site.environment, (*site.setup, *site.sbatch), str(path))
    return site


Reader = Callable[[Any, str], Any]


def _read(given: Any, keys: Mapping[str, Reader], where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"{where} holds {_kind(given)} instead of keys.", hint=f"Keys: {', '.join(keys)}.")
    for key in given:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.5)
            raise ConfigError(
                f"{where}: there is no key {str(key)!r}.",
                hint=f"Did you mean {close[0]}?" if close else f"Keys: {', '.join(keys)}.",
            )
    return {key: keys[key](value, f"{where}: {key}") for key, value in given.items() if value is not None}


def _wrong(value: Any, where: str, wanted: str, example: str) -> ConfigError:
    # What was set is not quoted: it may be a secret in the wrong place.
    return ConfigError(f"{where} is {_kind(value)}, must be {wanted}.", hint=f"For example {example}.")


def _kind(value: Any) -> str:
    if isinstance(value, str) and not value.strip():
        return "empty"
    names = {dict: "keys", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(value, where, "a text", f"{where.rpartition(' ')[2]}: name")
    return value


def _option_value(value: Any, where: str) -> str:
    """What follows ``=`` in an ``#SBATCH`` line: no blanks, no variables, nothing that ends or quotes it."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, where)
    if re.search(r"[\s$#\"'\\`]", text):
        raise ConfigError(
            f"{where}={text!r} cannot stand in an #SBATCH line.",
            hint="Write it without blanks, quotes, # and $: Slurm expands no variables there.",
        )
    return text


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(value, where, "a whole number", "8")
    if value < 1:
        raise ConfigError(f"{where}={value}, must be at least 1.", hint="Leave it out for the cluster's default.")
    return value


def _gpu_request(value: Any, where: str) -> str:
    if value not in get_args(GpuRequest):
        raise ConfigError(f"{where}={value!r} is not known.", hint=f"One of: {', '.join(get_args(GpuRequest))}.")
    return str(value)


def _list(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise _wrong(value, where, "a list of texts", "[first, second]")
    return tuple(value)


def _environment(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _wrong(value, where, "variables with values", "{HF_HUB_OFFLINE: 1}")
    for name, content in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
            raise ConfigError(f"{where}: {str(name)!r} is no name of a variable.", hint="For example HF_HUB_OFFLINE.")
        if isinstance(content, bool) or not isinstance(content, str | int | float):
            raise _wrong(content, f"{where}.{name}", "a text or a number", f'{name}: "1"')
    return {name: str(content) for name, content in value.items()}


def _container(value: Any, where: str) -> Container:
    given = _read(value, {"image": _text, "binds": _list}, where)
    if "image" not in given:
        raise ConfigError(f"{where} names no image.", hint="For example container: {image: /images/eetrain.sif}.")
    return Container(**given)


# What `eetrain submit` says itself, with the flag or key that sets it; and what would undo the way jobs are launched.
_TAKEN = {
    "nodes": "--nodes of eetrain submit",
    "ntasks": "--nodes and --gpus of eetrain submit",
    "ntasks-per-node": "--gpus of eetrain submit",
    "gpus": "--gpus of eetrain submit",
    "gpus-per-node": "--gpus of eetrain submit",
    "gres": "gpu_request: gres and --gpus of eetrain submit",
    "time": "--time of eetrain submit",
    "array": "--array of eetrain submit",
    "signal": "signal_seconds",
    **{key: key for key in ("partition", "account", "qos", "constraint")},
    "cpus-per-task": "cpus_per_task",
    "mem": "memory",
    **dict.fromkeys(("output", "error", "chdir"), "--run: eetrain submit keeps logs in the run's folder"),
    **dict.fromkeys(("requeue", "no-requeue", "open-mode"), "nothing: jobs are requeued and go on with their log"),
}


def _sbatch(value: Any, where: str) -> tuple[str, ...]:
    options = _list(value, where)
    for option in options:
        name = re.split(r"[=\s]", option, maxsplit=1)[0]
        if not re.fullmatch(r"--[a-z][a-z0-9-]*", name) or re.search(r"[\n$#`]", option):
            shown = name if "=" in option else option  # a value may be a secret
            raise ConfigError(
                f"{where}: {shown!r} is no option of sbatch that can stand in an #SBATCH line.",
                hint="Write one option an entry, as --name or --name=value, without $ and #.",
            )
        if name[2:] in _TAKEN:
            raise ConfigError(f"{where}: {name} is set elsewhere.", hint=f"Use {_TAKEN[name[2:]]}.")
    return options


_KEYS: dict[str, Reader] = {
    **dict.fromkeys(("partition", "account", "qos", "constraint", "gpu_type", "memory"), _option_value),
    "gpu_request": _gpu_request,
    **dict.fromkeys(("cpus_per_task", "signal_seconds"), _count),
    **dict.fromkeys(("modules", "setup"), _list),
    "environment": _environment,
    **dict.fromkeys(("caches", "python"), _text),
    "container": _container,
    "sbatch": _sbatch,
}
assert set(_KEYS) == {entry.name for entry in fields(Site)}
