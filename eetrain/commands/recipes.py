"""The recipes that come with the repository, read from the comments at their heads.

A header is the comment a recipe starts with::

    # purpose: fine-tune a 12-block Llama with three exits
    # paper: EE-LLM, arXiv 2312.04916
    # command: eetrain fit -c recipes/e2e/joint.yaml
    # hardware: 2 CPU cores, 4 GB
    # minutes: 9
    # expected: BLEU 68 at full depth,
    #   agreement .85 after block 4

``#`` and at least two spaces go on with the line before; any other comment is free text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import eetrain
from eetrain.errors import ConfigError

REQUIRED = ("purpose", "command", "hardware", "minutes", "expected")
_KEYS = (*REQUIRED, "paper")
_ENTRY = re.compile(rf"# ?({'|'.join(_KEYS)}):\s*(.*)")
_MORE = re.compile(r"#\s{2,}(\S.*)")


@dataclass(frozen=True)
class RecipeHeader:
    """What a recipe says about itself; ``paper`` may be missing.

    Attributes:
        purpose: what it trains or measures.
        command: that runs it.
        hardware: it was measured on.
        minutes: it took there.
        expected: numbers to expect.
        paper: that it follows.
    """

    purpose: str
    command: str
    hardware: str
    minutes: str
    expected: str
    paper: str | None = None


def read_header(path: str | Path) -> RecipeHeader:
    """Read a recipe's header.

    Raises:
        ConfigError: the file cannot be read, or an entry is missing, empty or stands there twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", hint="Give a YAML file.") from error
    entries = _entries(path, lines)
    missing = [key for key in REQUIRED if not entries.get(key)]
    if missing:
        raise ConfigError(
            f"{path}: the header lacks {', '.join(missing)}.",
            hint=f"Start the file with lines such as '# {missing[0]}: ...'.",
        )
    return RecipeHeader(**entries)


def _entries(path: Path, lines: list[str]) -> dict[str, str]:
    entries: dict[str, str] = {}
    current: str | None = None
    for line in lines:
        if not line.startswith("#"):
            break
        if entry := _ENTRY.fullmatch(line):
            current = entry[1]
            if current in entries:
                raise ConfigError(f"{path}: the header has {current} twice.", hint="Keep one of them.")
            entries[current] = _joinable(entry[2])
        elif (more := _MORE.fullmatch(line)) and current is not None:
            entries[current] = f"{entries[current]} {_joinable(more[1])}".strip()
        else:
            current = None
    return entries


def _joinable(text: str) -> str:
    """Without the backslash that continues a command on the next line."""
    return text.strip().removesuffix("\\").strip()


def recipes_folder() -> Path | None:
    """The repository's ``recipes``; ``None`` where the package is installed without them."""
    folder = Path(eetrain.__file__).resolve().parent.parent / "recipes"
    return folder if folder.is_dir() else None


def find_recipes(folder: str | Path) -> list[Path]:
    """All recipes below a folder, sorted."""
    return sorted(Path(folder).rglob("*.yaml"))
