"""A benchmark's results, as plain data and files."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eetrain.errors import ConfigError
from eetrain.evaluation.bench.rows import Setting, bench_row

FORMAT = 1


@dataclass(frozen=True)
class Benchmark:
    """All that was measured.

    Attributes:
        settings: what was asked for.
        environment: where it was measured.
        num_blocks: of the model.
        exit_layers: of the model.
        measured: one entry a setting.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    num_blocks: int
    exit_layers: tuple[int, ...]
    measured: list[Setting]

    def with_settings(self, settings: dict[str, Any]) -> Benchmark:
        """The same results with more settings beside those of the run."""
        return replace(self, settings={**settings, **self.settings})

    def rows(self, setting: Setting) -> list[dict[str, Any]]:
        """One flat row a candidate, see :func:`eetrain.evaluation.bench.rows.bench_row`."""
        return [bench_row(entry, setting, self.num_blocks) for entry in setting.measured]

    def to_dict(self) -> dict[str, Any]:
        """What ``bench.json`` holds."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "environment": self.environment,
            "num_blocks": self.num_blocks,
            "exit_layers": list(self.exit_layers),
            "measurements": [
                {
                    **setting.sizes(),
                    "order": setting.order,
                    "unavailable": setting.unavailable,
                    "candidates": self.rows(setting),
                    "rounds": {entry.candidate.name: [asdict(t) for t in entry.timings] for entry in setting.measured},
                }
                for setting in self.measured
            ],
        }

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``bench.json`` and ``bench.csv``; return their paths.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        paths = [Path(folder) / "bench.json", Path(folder) / "bench.csv"]
        rows = [{**setting.sizes(), **row} for setting in self.measured for row in self.rows(setting)]
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            paths[0].write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            with paths[1].open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise ConfigError(
                f"The results cannot be written to {str(folder)!r}: {error.strerror or error}.",
                hint="Set --out to a folder that you may write to.",
            ) from error
        return paths
