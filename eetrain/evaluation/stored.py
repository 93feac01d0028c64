"""Report folders that `eetrain evaluate --out` wrote, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eetrain.errors import DataError
from eetrain.evaluation.metrics import Entry
from eetrain.evaluation.report import FORMAT


@dataclass(frozen=True)
class StoredReport:
    """One report folder.

    Attributes:
        name: what the user calls it.
        folder: where it was read.
        results: what ``results.json`` holds.
        entries: one a prompt, see ``Report.outputs``.
    """

    name: str
    folder: str
    results: dict[str, Any]
    entries: list[Entry]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The row of each policy."""
        return {row["policy"]: row for row in self.results["policies"]}

    @property
    def timed(self) -> bool:
        """Whether it holds times."""
        return any(self.results["timings"].values())


def read_report(name: str, folder: str) -> StoredReport:
    """Read a folder.

    Raises:
        DataError: it is none of a report, cannot be read, or is of another format.
    """
    results_path, entries_path = Path(folder) / "results.json", Path(folder) / "outputs.jsonl"
    missing = [path.name for path in (results_path, entries_path) if not path.is_file()]
    if missing:
        raise DataError(
            f"{name}: {folder!r} is no report: it has no {' and no '.join(missing)}.",
            hint="Give the folder that `eetrain evaluate --out` wrote.",
        )
    try:
        results = json.loads(results_path.read_text(encoding="utf-8"))
        entries = [json.loads(line) for line in entries_path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: the report in {folder!r} cannot be read: {error}.", hint="Write it again.") from error
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{name}: the report in {folder!r} has format {found}, this version reads {FORMAT}.",
            hint="Run `eetrain evaluate --out` again with this version.",
        )
    return StoredReport(name, folder, results, entries)


def check_same_prompts(one: StoredReport, other: StoredReport) -> None:
    """See that two reports answer the same question.

    Raises:
        DataError: their prompts, references or longest outputs differ; says where.
    """
    hint = "Evaluate all checkpoints with the same --data, --prompt, --response, --limit and --max_new_tokens."
    lengths = [report.results["settings"]["max_new_tokens"] for report in (one, other)]
    for what, mine, yours in (
        ("prompts", len(one.entries), len(other.entries)),
        ("new tokens at most", *lengths),
    ):
        if mine != yours:
            raise DataError(f"{one.name} has {mine} {what}, {other.name} has {yours}.", hint=hint)
    for place, (mine, yours) in enumerate(zip(one.entries, other.entries, strict=True), start=1):
        for what in ("prompt", "references"):
            if mine[what] != yours[what]:
                raise DataError(
                    f"The {what} of prompt {place} differ: {_short(mine[what])} in {one.name}, "
                    f"{_short(yours[what])} in {other.name}.",
                    hint=hint,
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
