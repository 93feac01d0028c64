"""`eetrain ls`: what can be run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from eetrain.commands.output import print_json, print_table
from eetrain.commands.recipes import find_recipes, read_header, recipes_folder
from eetrain.errors import ConfigError

_COLUMNS = ("name", "purpose", "hardware", "minutes", "command")


def ls(folder: str | None = None, json: bool = False) -> int:
    """List the recipes: purpose, hardware, minutes and command of each.

    Args:
        folder: where to look; by default the recipes of the repository that eetrain is installed from.
        json: write one JSON object, with paper and expected numbers too.
    """
    place = _place(folder)
    rows = [_row(path, place) for path in find_recipes(place)]
    if json:
        print_json({"folder": str(place), "recipes": rows})
        return 0
    if not rows:
        raise ConfigError(f"There are no recipes in {str(place)!r}.", hint="Name a folder with *.yaml by --folder.")
    shown = [{**row, "purpose": f"ERROR: {row['error']}"} if row["error"] else row for row in rows]
    print_table(f"recipes in {place}", _COLUMNS, [[row.get(name) for name in _COLUMNS] for row in shown], left=5)
    return 0


def _place(folder: str | None) -> Path:
    place = recipes_folder() if folder is None else Path(folder)
    if place is None:
        raise ConfigError(
            "eetrain is installed without its recipes.",
            hint="They come with the repository, not with the package: clone it and run `pip install -e .` in it, or "
            "name a folder by --folder.",
        )
    if not place.is_dir():
        raise ConfigError(f"There is no folder {folder!r}.", hint="Name a folder with recipes by --folder.")
    return place


def _row(path: Path, place: Path) -> dict[str, Any]:
    name = path.relative_to(place).with_suffix("").as_posix()
    try:
        return {"name": name, "path": str(path), "error": None, **asdict(read_header(path))}
    except ConfigError as error:
        return {"name": name, "path": str(path), "error": error.message}
