"""`eetrain compare`: several reports of `eetrain evaluate` as one table and one picture."""

from __future__ import annotations

from typing import Any

from eetrain.commands.numbers import with_intervals
from eetrain.commands.output import print_json, print_table
from eetrain.errors import ConfigError
from eetrain.evaluation import Comparison, compare_reports
from eetrain.evaluation.comparison_files import write_comparison

_COLUMNS = {
    "mean_depth": "depth",
    "blocks_per_token": "blocks/token",
    "decode_tokens_per_second": "tokens/s",
    "speedup": "x never",
}


def compare(
    reports: list[str],
    baseline: str | None = None,
    metric: str = "bleu",
    skip: int = 0,
    out: str | None = None,
    json: bool = False,
) -> int:
    """Compare checkpoints and policies that were evaluated on the same prompts.

    Args:
        reports: NAME=FOLDER, each a folder that `eetrain evaluate --out` wrote; a further folder under the same name
            adds times that were measured apart.
        baseline: NAME:POLICY that differences are taken to; by default never of the first report.
        metric: bleu, rouge_l, exact_match or nll.
        skip: leave out the first so many prompts, on which thresholds were chosen, say; blocks/token and times stay
            those of all prompts.
        out: folder for comparison.json, comparison.csv and frontier.png.
        json: write one JSON object.
    """
    comparison = compare_reports([_named(report) for report in reports], metric, baseline, skip)
    files = [str(path) for path in write_comparison(comparison, out)] if out is not None else []
    if json:
        print_json({**comparison.to_dict(), "files": files})
    else:
        _show(comparison)
    return 0


def _named(report: str) -> tuple[str, str]:
    name, equals, folder = report.partition("=")
    if not equals or not name or not folder:
        raise ConfigError(
            f"{report!r} is not NAME=FOLDER.", hint="For example: eetrain compare tuned=runs/a plain=runs/b."
        )
    if ":" in name:
        raise ConfigError(
            f"The name {name!r} has a colon, which parts name and policy in --baseline.", hint="Choose another name."
        )
    return name, folder


def _show(comparison: Comparison) -> None:
    columns = {key: name for key, name in _COLUMNS.items() if any(row[key] is not None for row in comparison.rows)}
    several = comparison.prompts > 1
    note = "± is half of the 95 % interval over prompts" if several else "one prompt only, so no intervals"
    less = " (less is better)" if comparison.quality.lower_is_better else ""
    baseline = ":".join(comparison.baseline)
    print_table(
        f"{comparison.prompts} prompts, {comparison.quality.title}{less}, differences to {baseline}; {note}",
        ["model", "policy", comparison.quality.title, "difference", "%", "worse", *columns.values()],
        _rows(comparison, list(columns)),
        left=2,
    )


def _rows(comparison: Comparison, columns: list[str]) -> list[list[Any]]:
    qualities = with_intervals([(row["quality"], row["low"], row["high"]) for row in comparison.rows])
    deltas = [(row["delta"], row["delta_low"], row["delta_high"]) for row in comparison.rows]
    rows: list[list[Any]] = []
    for row, quality, delta in zip(comparison.rows, qualities, with_intervals(deltas, signed=True), strict=True):
        own = (row["model"], row["policy"])
        difference = ["baseline", None, None] if own == comparison.baseline else [delta, *_shares(row)]
        rows.append([*own, quality, *difference, *(row[key] for key in columns)])
    return rows


def _shares(row: dict[str, Any]) -> list[str | None]:
    percent, share = row["delta_percent"], row["share_worse"]
    return [None if percent is None else f"{percent:+.1f}", None if share is None else f"{share:.0%}"]
