"""Batch scripts from templates: text in, text out.

A template is a whole script. Its ``#SBATCH`` lines are its defaults; those of a job take their place or follow them.
What stands between the lines ``# >>> settings`` and ``# <<< settings`` is replaced by the settings of the job.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from eetrain.cluster.site import Site
from eetrain.errors import ConfigError

BEGIN, END = "# >>> settings", "# <<< settings"
_OPTION = re.compile(r"#SBATCH\s+--(?P<name>[a-z][a-z-]*)")
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", flags=re.ASCII)
_TIMES = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
# The controller looks at time limits every 30 s, and a job should train between its start and the signal.
_LEAST_BEFORE_SIGNAL = 60
# A signal that comes before Python listens would end the task. What is ignored stays ignored through exec, until then.
_SURVIVE = """sh -c 'trap "" USR1; exec "$@"' sh"""


@dataclass(frozen=True)
class Resources:
    """What a job asks for.

    Args:
        nodes: machines.
        devices: of each machine, with one task each.
        time: limit, as sbatch takes it.
    """

    nodes: int
    devices: int
    time: str

    def __post_init__(self) -> None:
        for flag, count in (("nodes", self.nodes), ("gpus", self.devices)):
            if count < 1:
                raise ConfigError(f"--{flag} is {count}, must be at least 1.", hint="--gpus counts those of each node.")
        seconds(self.time)


def seconds(time: str) -> int:
    """The seconds of a time as sbatch takes it; 0 is no limit.

    Raises:
        ConfigError: it is none.
    """
    for form in _TIMES:
        if found := re.fullmatch(form, time, flags=re.ASCII):
            return sum(_SECONDS[unit] * int(count) for unit, count in found.groupdict().items() if count)
    raise ConfigError(
        f"--time {time!r} is no time.",
        hint="Write minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, such as 24:00:00.",
    )


def site_options(site: Site, resources: Resources) -> dict[str, str | None]:
    """The options of sbatch that site and resources ask for: value by name, ``None`` for those without a value."""
    gpus = f"{site.gpu_type}:{resources.devices}" if site.gpu_type else str(resources.devices)
    memory, cpus = site.memory, site.cpus_per_task
    options = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "nodes": str(resources.nodes),
        "ntasks-per-node": str(resources.devices),
        "gpus-per-node": gpus if site.gpu_request == "gpus-per-node" else None,
        "gres": f"gpu:{gpus}" if site.gpu_request == "gres" else None,
        "cpus-per-task": None if cpus is None else str(cpus),
        "mem": memory,
        "time": resources.time,
    }
    given: dict[str, str | None] = {name: value for name, value in options.items() if value is not None}
    for option in site.sbatch:
        name, *value = re.split(r"[=\s]", option[2:], maxsplit=1)
        given[name] = value[0] if value else None
    return given


def signal_option(site: Site, resources: Resources) -> str:
    """What ``--signal`` gets, so that all tasks are told to save.

    Raises:
        ConfigError: there is no time to train between the start and the signal.
    """
    limit = seconds(resources.time)
    if 0 < limit < site.signal_seconds + _LEAST_BEFORE_SIGNAL:
        raise ConfigError(
            f"--time {resources.time} is {limit} s, but a job is told to save {site.signal_seconds} s before its end.",
            hint="Ask for more time, or set signal_seconds of the site file to less.",
        )
    return f"SIGUSR1@{site.signal_seconds}"  # with "B:" it would go to the script alone


def folder_options(folder: Path, log: str, work: Path) -> dict[str, str | None]:
    """The options that say where a job works and writes.

    Args:
        folder: of its log.
        log: the log's name, with sbatch's ``%j`` and so on.
        work: where the job starts.

    Raises:
        ConfigError: a path that cannot stand in an ``#SBATCH`` line.
    """
    for path in (folder, work):
        if re.search(r"[\"\\\n$]", str(path)):
            raise ConfigError(
                f"The path {str(path)!r} cannot stand in an #SBATCH line.",
                hint='Use one without ", \\, $ and line breaks.',
            )
    escaped = str(folder).replace("%", "%%")  # % begins sbatch's own patterns
    return {"chdir": f'"{work}"', "output": f'"{escaped}/{log}"'}


def site_settings(site: Site) -> list[str]:
    """The lines of bash that site asks for, and ``python``, the words that start the interpreter."""
    lines = []
    if site.modules or site.setup:
        loads = [f"module load {shlex.quote(module)}" for module in site.modules]
        # Modules and the scripts of virtual environments read variables that are not set.
        lines += ["set +u", *loads, *site.setup, "set -u"]
    caches = {"HF_HOME": "huggingface", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    if site.caches is not None:
        lines += [f"export {name}={expanding(f'{site.caches}/{below}')}" for name, below in caches.items()]
    lines += [f"export {name}={expanding(value)}" for name, value in site.environment.items()]
    return [*lines, f"python=({' '.join(_interpreter(site))})"]


def _interpreter(site: Site) -> list[str]:
    if site.container is None:
        return [expanding(site.python)]
    gpus = [] if site.gpu_request == "none" else ["--nv"]
    binds = [word for bind in site.container.binds for word in ("--bind", expanding(bind))]
    return ["apptainer exec", *gpus, *binds, expanding(site.container.image), _SURVIVE, expanding(site.python)]


def quoted(text: str | Path) -> str:
    """One word of bash that means exactly this text."""
    return shlex.quote(str(text))


def expanding(text: str) -> str:
    """One word of bash in which ``$NAME`` and ``${NAME}`` are variables and nothing else is special."""
    pieces, end = [], 0
    for found in _VARIABLE.finditer(text):
        pieces += [_literal(text[end : found.start()]), found[0]]
        end = found.end()
    return f'"{"".join([*pieces, _literal(text[end:])])}"'


def _literal(text: str) -> str:
    return re.sub(r"([\\\"$`])", r"\\\1", text)


def render(template: str, options: Mapping[str, str | None], settings: Iterable[str]) -> str:
    """Fill a template in.

    Args:
        template: its text.
        options: of sbatch: they replace the template's lines of the same name, or follow its last one.
        settings: lines of bash that take the place of the template's own.

    Raises:
        ConfigError: the template has no ``#SBATCH`` lines, or no place for settings.
    """
    lines = template.splitlines()
    places = [number for number, line in enumerate(lines) if _OPTION.match(line)]
    if not places or lines.count(BEGIN) != 1 or lines.count(END) != 1 or lines.index(BEGIN) > lines.index(END):
        raise ConfigError(
            f"The template has no #SBATCH lines, or no lines {BEGIN!r} and {END!r} once each.",
            hint="Start from slurm/train.sbatch or slurm/eval_array.sbatch.",
        )
    left = dict(options)
    for number in places:
        if (found := _OPTION.match(lines[number])) and found["name"] in left:
            lines[number] = _sbatch_line(found["name"], left.pop(found["name"]))
    begin, end = lines.index(BEGIN), lines.index(END)
    more = [_sbatch_line(name, value) for name, value in left.items()]
    after = places[-1] + 1
    return "\n".join([*lines[:after], *more, *lines[after : begin + 1], *settings, *lines[end:]]) + "\n"


def _sbatch_line(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={value}"
