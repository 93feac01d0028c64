"""What `eetrain evaluate` shows: policies, their differences to `never`, exits."""

from __future__ import annotations

from typing import Any

from eetrain.commands.numbers import with_intervals
from eetrain.commands.output import print_table
from eetrain.evaluation import Report

_COLUMNS = {
    "full_depth_agreement": "agrees",
    "same_as_never": "same",
    "mean_depth": "depth",
    "depth_p10": "p10",
    "depth_p50": "p50",
    "depth_p90": "p90",
    "blocks_per_token": "blocks/token",
    "acceptance": "accepted",
    "tokens_per_round": "tokens/round",
    "prefill_seconds": "prefill s",
    "decode_tokens_per_second": "tokens/s",
    "speedup": "x never",
}
_QUALITY_COLUMNS = {"bleu": "BLEU", "rouge_l": "ROUGE-L", "exact_match": "exact", "reference_nll": "NLL"}
_EXIT_COLUMNS = {
    "exit": "exit",
    "agreement": "agreement",
    "agreement_tokens": "tokens",
    "reference_nll": "NLL of references",
    "reference_accuracy": "accuracy",
    "reference_tokens": "reference tokens",
}


def show_report(report: Report) -> None:
    """Write the tables of a report to stdout."""
    timed = bool(report.timings["never"])
    rows = report.policies
    qualities = {key: name for key, name in _QUALITY_COLUMNS.items() if rows[0][key] is not None}
    columns = {key: name for key, name in _COLUMNS.items() if any(row[key] is not None for row in rows)}
    where = report.environment
    speed = f", {where['threads']} threads, {where['dtype']}, batch {report.settings['batch_size']}" if timed else ""
    several = len(report.outputs) > 1
    note = "± is half of the 95 % interval over prompts" if several else "one prompt only, so no intervals"
    print_table(
        f"{report.settings['prompts']} prompts, {report.num_blocks} blocks{speed}; {note}",
        ["policy", *qualities.values(), *columns.values()],
        [
            [row["policy"], *quality, *(row[key] for key in columns)]
            for row, quality in zip(rows, _qualities(rows, list(qualities)), strict=True)
        ],
    )
    if len(rows) > 1:
        keys = [f"{key}_delta" for key in qualities]
        differences = _qualities(rows[1:], keys, signed=True)
        print_table(
            "difference to never",
            ["policy", *qualities.values()],
            [[row["policy"], *quality] for row, quality in zip(rows[1:], differences, strict=True)],
        )
    print_table(
        "exits on given text",
        list(_EXIT_COLUMNS.values()),
        [[row[key] for key in _EXIT_COLUMNS] for row in report.exits],
    )


def _qualities(rows: list[dict[str, Any]], keys: list[str], *, signed: bool = False) -> list[tuple[str | None, ...]]:
    """For every row its values with their intervals."""
    columns = [
        with_intervals([(row[key], row[f"{key}_low"], row[f"{key}_high"]) for row in rows], signed=signed)
        for key in keys
    ]
    return list(zip(*columns, strict=True))
