r"""Would Mirror speculative decoding, or a tree of drafts, beat a chain of drafts on this checkpoint and machine?

    python recipes/bench/mirror_and_trees.py CHECKPOINT --data DEV.csv --prompt '{mr}\n=> ' --response '{ref}' \
        --limit 60 --draft_exits 3,4 --guess_exits 3,4,6,9 --threads 2 --out FOLDER

From the checkpoint's own greedy texts: how often the next token is among an exit's best guesses; how often, at the end
of a round, the branch that goes on from the accepted drafts and their correction has been drafted ahead (Mirror, arXiv
2510.13161); how often the second or third guess is right where a draft is wrong (trees). Set against times of the parts
on this machine. Mirror gets one thread for the target and one for the draft worker; the chain of drafts, its rival
(LayerSkip, arXiv 2404.16710), and the full depth get one or all, whichever is faster. What is not counted speaks for
the alternatives: copying keys and values of branches, masks of trees, the interpreter's lock; only for the best Mirror
the two threads are also timed together. Its tokens are checked with a worker thread that really runs beside the target.

Writes mirror_and_trees.json and prints a verdict.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from checkpoint_and_prompts import add_arguments, machine, numbers, opened, write_json
from greedy_traces import traces
from mirror_emulation import Mirror
from mirror_model import (
    CHAIN,
    MirrorCosts,
    Text,
    Tree,
    TreeCosts,
    between,
    hit_rate,
    hits,
    num_branches,
    recall,
    rollout_seconds,
    second_chances,
    tokens_a_round,
)
from mirror_times import Grid, Times, all_times, draft_times, overlap, tree_costs

from eetrain import MultiExitModel
from eetrain.evaluation import Sample

TREES = tuple(
    Tree(kind, width, grown)
    for kind, grown in (("first", False), ("first", True), ("unsure", False), ("unsure", True), ("every", False))
    for width in (2, 3)
)


def main() -> None:
    args = arguments()
    draft_exits, guess_exits = numbers(args.draft_exits), numbers(args.guess_exits)
    gammas, kappas = numbers(args.gammas), numbers(args.kappas)
    model, encoder, samples = opened(args, [*draft_exits, *guess_exits])
    most = max(gammas)
    texts = traces(model, encoder, samples, draft_exits, gamma=most, width=3, new_tokens=args.new_tokens)
    context = int(mean(len(sample.prompt_ids) for sample in samples) + args.new_tokens / 4)
    result: dict[str, Any] = {"machine": machine(model), "texts": len(texts)}
    result["tokens"] = sum(len(text.truth) for text in texts)
    result["settings"] = {key: value for key, value in vars(args).items() if key != "out"}
    result["recall"] = {layer: {k: recall(texts, layer, k) for k in kappas} for layer in guess_exits}
    result["chances"] = {e: {g: second_chances(texts, e, g) for g in gammas} for e in draft_exits}
    grid = draft_exits, guess_exits, gammas, kappas
    times = all_times(model, grid, context, args.repeats)
    result["threads"] = min(times, key=lambda number: times[number]["full"])
    costs = {layer: tree_costs(times[result["threads"]], layer, gammas) for layer in draft_exits}
    result["costs"] = {layer: asdict(cost) for layer, cost in costs.items()}
    result["trees"] = tree_rows(texts, costs, gammas)
    result["mirror"] = mirror_rows(texts, times, costs[draft_exits[0]].chain.full, grid)
    result["emulated"] = emulate(model, samples, texts, result["mirror"], args)
    result["verdict"] = verdict(result)
    report(result)
    write_json(Path(args.out) / "mirror_and_trees.json", result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--draft_exits", required=True, help="such as 3,4")
    parser.add_argument("--guess_exits", required=True, help="such as 3,6,9; those below a draft exit are left out")
    parser.add_argument("--gammas", default="2,4,6,8", help="drafts a round")
    parser.add_argument("--kappas", default="1,2,4,8", help="guesses a position")
    parser.add_argument("--new_tokens", type=int, default=64, help="of each text, at most")
    parser.add_argument("--repeats", type=int, default=30, help="of each timed part")
    parser.add_argument("--emulate", type=int, default=4, help="prompts decoded with a real worker thread")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def tree_rows(texts: Sequence[Text], costs: dict[int, TreeCosts], gammas: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "exit": layer,
            "gamma": gamma,
            **asdict(tree),
            "tokens_per_round": tokens_a_round(texts, layer, gamma, tree),
            "speedup": cost.speedup(texts, layer, gamma, tree),
        }
        for layer, cost in costs.items()
        for gamma in gammas
        for tree in (CHAIN, *TREES)
    ]


def mirror_rows(texts: Sequence[Text], times: dict[int, Times], full: float, grid: Grid) -> list[dict[str, Any]]:
    """One row a choice of draft exit, guess exit, gamma and kappa; each side on one thread."""
    rows = []
    for e, guess, gamma, kappa in itertools.product(*grid):
        if guess < e:
            continue
        early, head = draft_times(times[1], e)
        target = (times[1][f"target {part} {e} {guess} {gamma}"] for part in ("head", "rest"))
        branches = num_branches(kappa, gamma, e == guess)
        spent = rollout_seconds(between(early, branches), between(head, branches), gamma)
        costs = MirrorCosts(*target, spent, rollout_seconds(early[1], head[1], gamma))
        hit, tokens = hit_rate(texts, e, guess, gamma, kappa), tokens_a_round(texts, e, gamma)
        rows.append(
            {
                "exit": e,
                "guess_exit": guess,
                "gamma": gamma,
                "kappa": kappa,
                "branches": branches,
                "hit_rate": hit,
                "tokens_per_round": tokens,
                **{f"{name}_ms": 1000 * seconds for name, seconds in asdict(costs).items()},
                "step_ms": 1000 * costs.step(hit),
                "speedup": tokens * full / costs.step(hit),
            }
        )
    return rows


def emulate(
    model: MultiExitModel,
    samples: Sequence[Sample],
    texts: Sequence[Text],
    rows: Sequence[dict[str, Any]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Tokens and hits of the best cell with a real worker, and how long its two threads take side by side."""
    best = max(rows, key=lambda row: row["speedup"])
    e, guess, gamma, kappa = (best[key] for key in ("exit", "guess_exit", "gamma", "kappa"))
    mirror, same, as_traced = Mirror(model, e, guess, gamma, kappa), 0, 0
    chosen = list(zip(samples, texts, strict=True))[: args.emulate]
    for sample, text in chosen:
        run = mirror.decode(sample.prompt_ids, len(text.truth))
        same += run.tokens == list(text.truth)
        as_traced += run.hits == hits(text, e, guess, gamma, kappa)
    together, alone = overlap(model, best, args.repeats)
    return {
        "cell": [e, guess, gamma, kappa],
        "prompts": len(chosen),
        "same_tokens": same,
        "hits_as_traced": as_traced,
        "together_ms": 1000 * together,
        "longer_alone_ms": 1000 * alone,
    }


def verdict(result: dict[str, Any]) -> list[str]:
    chains = [row for row in result["trees"] if row["kind"] == "none"]
    chain = max(chains, key=lambda row: row["speedup"])
    tree = max((row for row in result["trees"] if row["kind"] != "none"), key=lambda row: row["speedup"])
    mirror = overlapping(max(result["mirror"], key=lambda row: row["speedup"]), result["emulated"])
    lines = [f"chain: {chain['speedup']:.3f} x the full depth (exit {chain['exit']}, {chain['gamma']} drafts)"]
    grown = ", with drafts of their own" if tree["grown"] else ""
    for name, row, how in (
        ("tree", tree, f"{tree['width']} guesses, kind {tree['kind']}{grown}, {tree['gamma']} drafts"),
        (
            "Mirror",
            mirror,
            f"guesses at exit {mirror['guess_exit']}, kappa {mirror['kappa']}, gamma {mirror['gamma']}, "
            f"hit rate {mirror['hit_rate']:.2f}",
        ),
    ):
        share = row["speedup"] / chain["speedup"] - 1
        judged = "would win" if share > 0.02 else "would lose" if share < -0.02 else "would change nothing:"
        lines.append(
            f"{name}: {judged} {share:+.1%} at best: {row['speedup']:.3f} x the full depth (exit {row['exit']}, {how})"
        )
    return lines


def overlapping(row: dict[str, Any], emulated: dict[str, Any]) -> dict[str, Any]:
    """Mirror's best cell, with its two threads taking as long side by side as they were found to."""
    longer = max(row["rest_ms"], row["branches_ms"])
    slower = max(1.0, emulated["together_ms"] / emulated["longer_alone_ms"])
    return row | {"speedup": row["speedup"] * row["step_ms"] / (row["step_ms"] + (slower - 1) * longer)}


def report(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['texts']} texts, {result['tokens']} tokens; ", end="")
    print(f"full depth, chain and trees with {result['threads']} threads, Mirror with 1 + 1")
    for layer, row in result["recall"].items():
        print(f"exit {layer}: next token among its best " + ", ".join(f"{k}: {v:.3f}" for k, v in row.items()))
    for layer, chances in result["chances"].items():
        for gamma, row in chances.items():
            shares = ", ".join(f"{name.replace('_', ' ')} {share:.3f}" for name, share in row.items())
            print(f"exit {layer}, {gamma} drafts: {shares}")
    for layer, cost in result["costs"].items():
        chain = {name: round(1000 * seconds, 3) for name, seconds in cost["chain"].items()}
        verified = ", ".join(f"{width}: {1000 * seconds:.3f}" for width, seconds in cost["verified"].items())
        print(f"exit {layer}, ms: {chain}; a further early position {1000 * cost['early_more']:.3f}, ", end="")
        print(f"in the head {1000 * cost['head_more']:.3f}; positions verified {verified}")
    print("\nMirror: exit  guess at  gamma  kappa  branches  hits  head ms  rest  branches  redraft  step  speed-up")
    keys = ("head_ms", "rest_ms", "branches_ms", "redraft_ms", "step_ms", "speedup")
    for row in result["mirror"]:
        first = [row[key] for key in ("exit", "guess_exit", "gamma", "kappa", "branches")]
        print("  ".join(map(str, first)), f" {row['hit_rate']:.3f} ", "  ".join(f"{row[key]:.3f}" for key in keys))
    print("\ntrees: exit  drafts  kind  width  grown  tokens/round  speed-up")
    for row in result["trees"]:
        first = [row[key] for key in ("exit", "gamma", "kind", "width", "grown")]
        print("  ".join(map(str, first)), f" {row['tokens_per_round']:.3f}  {row['speedup']:.3f}")
    print("\nemulated:", ", ".join(f"{key} {value}" for key, value in result["emulated"].items()))
    print("\n".join(result["verdict"]))


if __name__ == "__main__":
    main()
