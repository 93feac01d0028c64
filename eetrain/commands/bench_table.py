"""A benchmark as tables on stdout."""

from __future__ import annotations

from typing import Any

from eetrain.commands.output import print_table
from eetrain.evaluation.bench.report import Benchmark
from eetrain.evaluation.bench.rows import Setting

_COLUMNS = {
    "candidate": "candidate",
    "mean_depth": "depth",
    "blocks_per_token": "blocks/token",
    "same_tokens": "same tokens",
    "prefill_ms": "prefill ms",
    "step_ms": "step ms",
    "step_ms_min": "min",
    "step_ms_q1": "q1",
    "step_ms_q3": "q3",
    "step_ms_max": "max",
    "tokens_per_second": "tokens/s",
    "compile_seconds": "compile s",
    "predicted_speedup": "x predicted",
    "over_dynamic": "x dynamic",
    "over_static": "x static",
    "over_cut": "x cut",
    "cut_to": "cut to",
    "over_assistant": "x assistant",
    "assistant": "which",
    "acceptance": "acceptance",
    "tokens_per_round": "tokens/round",
    "rounds": "rounds",
}
_PROFILE_COLUMNS = {
    "candidate": "candidate",
    "profile_ms": "step ms",
    "blocks_ms": "blocks",
    "heads_ms": "heads",
    "harvest_ms": "harvest",
    "rest_ms": "rest",
}


def show_benchmark(found: Benchmark) -> None:
    """Write a table of times and one of where they go, a setting."""
    where = found.environment
    for setting in found.measured:
        rows = found.rows(setting)
        columns = {key: name for key, name in _COLUMNS.items() if any(row[key] is not None for row in rows)}
        print_table(_title(setting, found, where), list(columns.values()), [_line(row, columns) for row in rows])
        profiled = [row for row in rows if row["profile_ms"] is not None]
        print_table(
            "where a step goes, in one run with hooks",
            list(_PROFILE_COLUMNS.values()),
            [_line(row, _PROFILE_COLUMNS) for row in profiled],
        )
        if setting.unavailable:
            print_table("not measured", ["candidate", "because"], list(map(list, setting.unavailable.items())), left=2)


def _title(setting: Setting, found: Benchmark, where: dict[str, Any]) -> str:
    batches = len(setting.workload.batches)
    return (
        f"batch {setting.workload.batch_size}{f' x {batches}' if batches > 1 else ''}, prompt "
        f"{setting.workload.prompt_length}, {setting.new_tokens} new tokens, {found.num_blocks} blocks, "
        f"{where['threads']} threads, {where['dtype']}, median of {found.settings['repeats']}"
    )


def _line(row: dict[str, Any], columns: dict[str, str]) -> list[Any]:
    shown = {True: "yes", False: "no"}
    return [shown[row[key]] if isinstance(row[key], bool) else row[key] for key in columns]
