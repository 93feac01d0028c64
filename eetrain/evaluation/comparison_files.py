"""A comparison as files: numbers for programs, a table for spreadsheets, a picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from eetrain.errors import ConfigError
from eetrain.evaluation.comparison import Comparison
from eetrain.evaluation.frontier import draw_frontier
from eetrain.evaluation.frontier_point import FrontierPoint


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write ``comparison.json``, ``comparison.csv`` and ``frontier.png``; return their paths.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    folder = Path(folder)
    paths = [folder / name for name in ("comparison.json", "comparison.csv", "frontier.png")]
    blocks = {report["num_blocks"] for report in comparison.reports}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        with paths[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(comparison.rows[0]))
            writer.writeheader()
            writer.writerows(comparison.rows)
        draw_frontier(
            points(comparison),
            paths[2],
            quality=comparison.quality.title,
            num_blocks=blocks.pop() if len(blocks) == 1 else None,
            lower_is_better=comparison.quality.lower_is_better,
        )
    except OSError as error:
        raise ConfigError(
            f"The comparison cannot be written to {str(folder)!r}: {error.strerror or error}.",
            hint="Set --out to a folder that you may write to.",
        ) from error
    return paths


def points(comparison: Comparison) -> list[FrontierPoint]:
    """The rows as points of the frontier."""
    return [
        FrontierPoint(
            row["policy"],
            row["quality"],
            row["blocks_per_token"],
            row["speedup"],
            model=row["model"],
            low=row["low"],
            high=row["high"],
        )
        for row in comparison.rows
    ]
