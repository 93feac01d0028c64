"""A plan as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eetrain.errors import ConfigError
from eetrain.planning.simulation import Timeline
from eetrain.planning.timeline_picture import draw_timeline


def write_plan(found: dict[str, Any], timeline: Timeline, folder: str | Path, *, title: str) -> list[Path]:
    """Write ``plan.json`` and ``timeline.png`` and return their paths.

    Args:
        found: what the JSON file holds.
        timeline: what the picture shows.
        folder: made if it is not there.
        title: of the picture.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    paths = [Path(folder) / "plan.json", Path(folder) / "timeline.png"]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draw_timeline(timeline, paths[1], title)
    except OSError as error:
        raise ConfigError(
            f"The plan cannot be written to {str(folder)!r}: {error.strerror or error}.",
            hint="Set --out to a folder that you may write to.",
        ) from error
    return paths
