"""Results as rows, files and a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eetrain.errors import ConfigError
from eetrain.evaluation.bootstrap import described
from eetrain.evaluation.frontier import draw_frontier
from eetrain.evaluation.frontier_point import FrontierPoint
from eetrain.evaluation.metrics import METRICS, Metric

FORMAT = 2
"""Of the files; raised when what they hold changes."""


@dataclass(frozen=True)
class Report:
    """All that was measured, as plain data.

    Attributes:
        settings: what was asked for.
        environment: where it was measured.
        num_blocks: of the model.
        policies: one flat row a policy, see :func:`~eetrain.evaluation.rows.policy_row`.
        exits: one flat row an exit, the full depth last, see :func:`~eetrain.evaluation.rows.exit_row`.
        timings: seconds of every timed pass.
        outputs: one entry a prompt, see :func:`~eetrain.evaluation.outputs.prompt_entries`.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    num_blocks: int
    policies: list[dict[str, Any]]
    exits: list[dict[str, Any]]
    timings: dict[str, list[dict[str, float]]]
    outputs: list[dict[str, Any]]

    def with_settings(self, settings: dict[str, Any]) -> Report:
        """The same results with more settings beside those of the run."""
        return replace(self, settings={**settings, **self.settings})

    @property
    def quality(self) -> Metric:
        """What the frontier shows: BLEU, or without references to compare with the likelihood of the given text."""
        return METRICS["bleu" if self.policies[0]["bleu"] is not None else "nll"]

    def to_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds: everything but the texts."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "intervals": described(len(self.outputs)),
            "environment": self.environment,
            "num_blocks": self.num_blocks,
            "policies": self.policies,
            "exits": self.exits,
            "timings": self.timings,
        }

    def points(self) -> list[FrontierPoint]:
        """The policies as points of the frontier."""
        column = self.quality.column
        return [
            FrontierPoint(
                row["policy"],
                row[column],
                row["blocks_per_token"],
                row["speedup"],
                low=row[f"{column}_low"],
                high=row[f"{column}_high"],
            )
            for row in self.policies
        ]

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``results.json``, ``results.csv``, ``outputs.jsonl`` and ``frontier.png``; return their paths.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        folder = Path(folder)
        paths = [folder / name for name in ("results.json", "results.csv", "outputs.jsonl", "frontier.png")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths[0].write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            _write_csv(paths[1], self.policies)
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.outputs)
            paths[2].write_text("".join(lines), encoding="utf-8")
            draw_frontier(
                self.points(),
                paths[3],
                quality=self.quality.title,
                num_blocks=self.num_blocks,
                lower_is_better=self.quality.lower_is_better,
            )
        except OSError as error:
            raise ConfigError(
                f"The results cannot be written to {str(folder)!r}: {error.strerror or error}.",
                hint="Set --out to a folder that you may write to.",
            ) from error
        return paths


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    shares = sorted({key for row in rows for key in row if key.startswith("share_at_")}, key=lambda key: int(key[9:]))
    columns = [key for key in rows[0] if key not in shares] + shares
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval=0.0)
        writer.writeheader()
        writer.writerows(rows)
