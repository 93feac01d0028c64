"""Secrets have no place in files that are kept beside a run: what looks like one is refused, and never quoted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from eetrain.errors import ConfigError

# Whole words between underscores, or their ends: HF_TOKEN and MYTOKEN, but not TOKENIZERS_PARALLELISM.
_SECRET_WORD = re.compile(r"\w*(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)", flags=re.ASCII)
# Where a secret is kept may be said.
_PLACES = ("PATH", "FILE", "DIR")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=", flags=re.ASCII)
_LOGIN_IN_URL = re.compile(r"://[^/\s:@]+:[^/\s@]+@")


def looks_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret: ``HF_TOKEN``, ``WANDB_API_KEY``; not ``HF_TOKEN_PATH``."""
    words = name.upper().split("_")
    return words[-1] not in _PLACES and any(_SECRET_WORD.fullmatch(word) for word in words)


def refuse_secrets(environment: Mapping[str, str], lines: Iterable[str], where: str) -> None:
    """Check variables and lines of bash.

    Args:
        environment: names and values.
        lines: in which ``NAME=value`` is looked for.
        where: the file's name.

    Raises:
        ConfigError: names the variable, not its value.
    """
    lines = tuple(lines)
    assigned = [name for line in lines for name in _ASSIGNED.findall(line)]
    for name in (*environment, *assigned):
        if looks_secret(name):
            raise _refused(f"{where}: {name} looks like a secret")
    for name, value in environment.items():
        if _LOGIN_IN_URL.search(value):
            raise _refused(f"{where}: {name} holds an address with a password")
    if any(_LOGIN_IN_URL.search(line) for line in lines):
        raise _refused(f"{where}: an address with a password stands in it")


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"{what}, and would be written into the script of every job.",
        hint="Export it in the shell that submits, which Slurm hands on, or keep it in a file that only you can read, "
        "such as ~/.netrc.",
    )
