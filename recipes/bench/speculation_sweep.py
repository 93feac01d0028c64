r"""Self-speculative decoding by exit, draft length and batch size, beside the full depth and transformers' own.

    python recipes/bench/speculation_sweep.py CHECKPOINT --data DEV.csv --prompt '{mr}\n=> ' --response '{ref}' \
        --limit 24 --exits 2,3,4,6 --drafts 2,3,4,6,8 --batch_sizes 1,8 --threads 2 --out FOLDER

All cells, `never` and `assistant_early_exit` (batch 1; with each draft length, and with transformers' own schedule)
decode the same prompts in turn, once a round; ratios are taken within a round, medians are reported. Rows end where
their texts end, so that the share of accepted drafts is that of real text; outputs are compared with those of
transformers. Then the parts of a round are timed one by one: beside each measured speed-up stands what
eetrain.evaluation.speed_model makes of them, (a) if each draft were right with the measured acceptance, independently,
(b) with the measured tokens a round. Where (b) is above the measured, rounds take longer than their parts, and the two
columns of milliseconds say by how much; where (a) differs from (b), right drafts come in streaks.

Writes sweep.csv, sweep.json (there also how transformers' own drafting compares with its plain search) and sweep.png.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from block_times import Parts, line, medians, verification
from checkpoint_and_prompts import add_arguments, machine, numbers, opened, write_json
from speed_map import draw_map

from eetrain import MultiExitModel
from eetrain.decoding import parse_policy
from eetrain.evaluation.bench.assistant import Drafting, assistant_baseline, assistant_names
from eetrain.evaluation.bench.candidates import Candidate, dynamic_baseline, policy_candidate, run_once
from eetrain.evaluation.bench.prompts import Workload, real_prompts
from eetrain.evaluation.bench.rows import Measured, Setting, bench_row, ratio
from eetrain.evaluation.speed_model import RoundCosts, expected_speedup, speedup
from eetrain.evaluation.timing import Timing

Grid = dict[str, tuple[int, int]]
KEPT = ("acceptance", "tokens_per_round", "rounds", "over_dynamic", "over_assistant", "assistant", "same_tokens")


def main() -> None:
    args = arguments()
    exits, drafts = numbers(args.exits), numbers(args.drafts)
    model, encoder, samples = opened(args, exits)
    grid = {args.policy.format(exit=e, draft=g): (e, g) for e in exits for g in drafts}
    rows: list[dict[str, Any]] = []
    rivals: list[dict[str, Any]] = []
    unavailable: dict[str, str] = {}
    for size in numbers(args.batch_sizes):
        workload = real_prompts(samples, size, encoder.pad_id, model.device)
        setting = measure(model, workload, grid, args)
        costs = {e: measured_costs(model, setting, e, drafts, args) for e in exits}
        rows += [row(setting, name, grid[name], costs, model.num_blocks) for name in grid]
        rivals += rivals_of(setting)
        unavailable |= setting.unavailable
    write(args, model, rows, rivals, unavailable)
    report(rows, rivals, unavailable)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--exits", required=True, help="such as 2,3,4")
    parser.add_argument("--drafts", default="2,3,4,6,8")
    parser.add_argument("--batch_sizes", default="1")
    parser.add_argument("--policy", default="speculative:exit={exit},draft={draft}", help="with {exit} and {draft}")
    parser.add_argument("--new_tokens", type=int, default=64, help="of each row, at most")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that does not count")
    parser.add_argument("--name", default=None, help="of the model in the picture; by default that of its folder")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def measure(model: MultiExitModel, workload: Workload, grid: Grid, args: argparse.Namespace) -> Setting:
    """Everything once without the clock, then the rounds."""
    candidates, unavailable = candidates_of(model, workload, grid, args.new_tokens)
    reference = run_once(dynamic_baseline(model), workload, args.new_tokens, to_the_end=False)
    first = {c.name: run_once(c, workload, args.new_tokens, to_the_end=False) for c in candidates}
    timings: dict[str, list[Timing]] = {candidate.name: [] for candidate in candidates}
    for number in range(args.repeats):
        print(f"batch {workload.batch_size}, round {number + 1} of {args.repeats}", file=sys.stderr)
        for candidate in candidates:
            run = run_once(candidate, workload, args.new_tokens, to_the_end=False)
            timings[candidate.name].append(run.timing)
    entries = []
    for candidate in candidates:
        run = first[candidate.name]
        same = all(a.equal(b) for a, b in zip(run.tokens, reference.tokens, strict=True))
        entries.append(Measured(candidate, run, timings[candidate.name], same, None))
    return Setting(workload, args.new_tokens, list(timings), unavailable, entries)


def candidates_of(
    model: MultiExitModel, workload: Workload, grid: Grid, new_tokens: int
) -> tuple[list[Candidate], dict[str, str]]:
    found = [dynamic_baseline(model), policy_candidate(model, parse_policy("never"))]
    unavailable = {}
    for name, (layer, draft) in assistant_names([Drafting((e,), (g,)) for e, g in grid.values()]).items():
        try:
            candidate = assistant_baseline(model, layer, draft, workload.batch_size)
            run_once(candidate, workload, new_tokens, to_the_end=False)
        except Exception as error:  # whatever transformers raises with this family, the rest can be measured
            unavailable[f"{name}, batch {workload.batch_size}"] = getattr(error, "message", str(error))
        else:
            found.append(candidate)
    for text, (layer, _) in grid.items():
        found.append(replace(policy_candidate(model, parse_policy(text), (layer,)), name=text))
    return found, unavailable


def measured_costs(
    model: MultiExitModel, setting: Setting, layer: int, drafts: Sequence[int], args: argparse.Namespace
) -> RoundCosts:
    """Parts of a round with drafts from this exit, timed one by one; what a step of ``never`` takes besides its parts
    is taken to be spent once a round as well."""
    workload = setting.workload
    parts = Parts(model, workload.batch_size, workload.prompt_length + args.new_tokens // 2)
    widths = [draft + 1 for draft in drafts]
    early, full, tail = parts.blocks(1, layer, 1), parts.blocks(1, model.num_blocks, 1), parts.tail(1)
    named: dict[str, Callable[[], object]] = {
        "early": lambda: (parts.harvest(1), early()),
        "head": parts.head(layer),
        "full": lambda: (parts.harvest(1), full(), tail()),
        **verification(parts, layer, widths),
    }
    seconds = medians(named, 6 * args.repeats)
    verify, more = line({width: seconds[f"verify {layer} {width}"] for width in widths})
    rest = max(0.0, step_seconds(setting) - seconds["full"])
    return RoundCosts(seconds["early"], seconds["head"], verify + rest, more, seconds["full"] + rest)


def step_seconds(setting: Setting) -> float:
    """Of a decoding step of ``never``; a batch takes as many as its longest row has tokens after the first."""
    never = setting.find("never")
    assert never is not None
    steps = sum(ids.shape[1] - 1 for ids in never.first.tokens)
    return median(timing.decode for timing in never.timings) / steps


def row(
    setting: Setting, name: str, cell: tuple[int, int], costs: dict[int, RoundCosts], num_blocks: int
) -> dict[str, Any]:
    entry, never = setting.find(name), setting.find("never")
    assert entry is not None
    assert never is not None
    layer, draft = cell
    found = bench_row(entry, setting, num_blocks)
    ratios = [full.decode / own.decode for own, full in zip(entry.timings, never.timings, strict=True)]
    counts, own = entry.first.speculation, costs[layer]
    if found["acceptance"] is None:  # no drafts, or texts that end with the prompt's pass
        counts = None
    decode = median(timing.decode for timing in entry.timings)
    return {
        "batch_size": setting.workload.batch_size,
        "exit": layer,
        "draft": draft,
        "candidate": name,
        "over_never": ratio(entry, never),
        "over_never_min": min(ratios),
        "over_never_max": max(ratios),
        **{key: found[key] for key in KEPT},
        "predicted_independent": None if counts is None else expected_speedup(own, counts.acceptance, draft),
        "predicted": None if counts is None else speedup(own, draft, counts.tokens_per_round),
        "round_ms": None if counts is None else 1000 * decode / counts.rounds,
        "predicted_round_ms": None if counts is None else 1000 * own.round(draft),
        **{f"{part}_ms": 1000 * seconds for part, seconds in vars(own).items()},
    }


def rivals_of(setting: Setting) -> list[dict[str, Any]]:
    """transformers' own ways, and how many times faster than its plain greedy search each is."""
    dynamic = setting.find("dynamic")
    rivals = [entry for entry in setting.measured if entry.candidate.kind == "assistant"]
    never = setting.find("never")
    return [
        {
            "batch_size": setting.workload.batch_size,
            "candidate": entry.candidate.name,
            "over_dynamic": ratio(entry, dynamic),
        }
        for entry in [never, *rivals]
        if entry is not None
    ]


def write(
    args: argparse.Namespace,
    model: MultiExitModel,
    rows: list[dict[str, Any]],
    rivals: list[dict[str, Any]],
    unavailable: dict[str, str],
) -> None:
    folder = Path(args.out)
    where = machine(model)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    found = {"settings": settings, "machine": where, "rows": rows, "rivals": rivals, "missing": unavailable}
    write_json(folder / "sweep.json", found)
    with (folder / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    name = args.name or Path(args.model).name
    title = (
        f"{name}, {model.num_blocks} blocks: times the speed of the full depth, and how many judged drafts were right"
    )
    draw_map(rows, folder / "sweep.png", title, where)


def report(rows: Sequence[dict[str, Any]], rivals: Sequence[dict[str, Any]], unavailable: dict[str, str]) -> None:
    columns = {
        "batch_size": "batch",
        "exit": "exit",
        "draft": "draft",
        "over_never": "x never",
        "over_assistant": "x assistant",
        "acceptance": "accepted",
        "tokens_per_round": "tokens/round",
        "predicted_independent": "(a)",
        "predicted": "(b)",
        "round_ms": "round ms",
        "predicted_round_ms": "of parts",
        "same_tokens": "same",
    }
    print("  ".join(f"{title:>12}" for title in columns.values()))
    for found in rows:
        print("  ".join(f"{shown(found[key]):>12}" for key in columns))
    for rival in rivals:
        where, times = f"{rival['candidate']}, batch {rival['batch_size']}", shown(rival["over_dynamic"])
        print(f"{where}: {times} x transformers' greedy search")
    for name, reason in unavailable.items():
        print(f"{name}: {reason}")


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
