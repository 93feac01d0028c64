"""Times of what Mirror speculative decoding, trees and chains of drafts are made of, on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from block_times import Parts, line, medians, verification
from mirror_model import TreeCosts

from eetrain import MultiExitModel
from eetrain.evaluation.speed_model import RoundCosts

ROWS = (1, 2, 4, 8, 16, 32, 64)
Grid = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
"""Draft exits, guess exits, gammas, kappas."""
Times = dict[str, float]


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_times(model: MultiExitModel, grid: Grid, context: int, repeats: int) -> dict[int, Times]:
    """Threads -> parts: those of chains and trees with one thread and with all, those of Mirror with one.

    They all take turns, so that what slows the machine down for a while changes no ratio.
    """
    everything = max(1, torch.get_num_threads())
    chains = {"full": full_step(Parts(model, 1, context))} | chain_parts(model, grid, context)
    one = chains | draft_parts(model, grid, context) | target_parts(model, grid, context)
    named: dict[Any, Callable[[], object]] = {(1, name): on(1, run) for name, run in one.items()}
    named |= {(everything, name): on(everything, run) for name, run in chains.items() if everything > 1}
    with threads(everything):
        found = medians(named, repeats)
    return {n: {name: found[m, name] for m, name in found if m == n} for n in sorted({1, everything})}


def on(number: int, run: Callable[[], object]) -> Callable[[], object]:
    def with_threads() -> object:
        torch.set_num_threads(number)
        return run()

    return with_threads


def full_step(parts: Parts) -> Callable[[], object]:
    blocks, tail = parts.blocks(1, parts.model.num_blocks, 1), parts.tail(1)
    return lambda: (parts.harvest(1), blocks(), tail())


FEW = (1, 2, 4)
"""Positions of an early step, for what a further one costs."""


def widths_of(gammas: Sequence[int]) -> list[int]:
    """Positions to verify, up to those of the largest trees."""
    return sorted({gamma + 1 for gamma in gammas} | {2 * max(gammas) + 1})


def chain_parts(model: MultiExitModel, grid: Grid, context: int) -> dict[str, Callable[[], object]]:
    parts = Parts(model, 1, context)
    named: dict[str, Callable[[], object]] = {}
    for layer in grid[0]:
        for width in FEW:
            named[f"early {layer} {width}"] = early_step(parts, layer, width)
            named[f"head {layer} {width}"] = parts.head(layer, width)
        named |= verification(parts, layer, widths_of(grid[2]))
    return named


def tree_costs(found: Times, layer: int, gammas: Sequence[int]) -> TreeCosts:
    early, head = ({width: found[f"{name} {layer} {width}"] for width in FEW} for name in ("early", "head"))
    verified = {width: found[f"verify {layer} {width}"] for width in widths_of(gammas)}
    verify, more = line(verified)
    return TreeCosts(
        RoundCosts(early[1], head[1], verify, more, found["full"]), line(early)[1], line(head)[1], verified
    )


def early_step(parts: Parts, layer: int, positions: int) -> Callable[[], object]:
    blocks = parts.blocks(1, layer, positions)
    return lambda: (parts.harvest(positions), blocks())


def draft_parts(model: MultiExitModel, grid: Grid, context: int) -> dict[str, Callable[[], object]]:
    """An early step, and its head, on several rows of a batch."""
    named: dict[str, Callable[[], object]] = {}
    for rows in ROWS:
        parts = Parts(model, rows, context)
        for layer in grid[0]:
            named[f"draft {layer} {rows}"] = early_step(parts, layer, 1)
            named[f"draft head {layer} {rows}"] = parts.head(layer)
    return named


def draft_times(found: Times, layer: int) -> list[dict[int, float]]:
    """Rows -> time of an early step, and of its head."""
    return [{rows: found[f"{name} {layer} {rows}"] for rows in ROWS} for name in ("draft", "draft head")]


def target_parts(model: MultiExitModel, grid: Grid, context: int) -> dict[str, Callable[[], object]]:
    """What a target runs up to its guesses, and after them, for every draft exit, guess exit and gamma."""
    parts = Parts(model, 1, context)
    named: dict[str, Callable[[], object]] = {}
    for e, guess, gamma in itertools.product(*grid[:3]):
        if guess >= e:
            blocks, head = parts.blocks(e + 1, guess, gamma + 1), parts.head(guess, gamma + 1)
            named[f"target head {e} {guess} {gamma}"] = target_head(parts, blocks, head, gamma + 1)
            named[f"target rest {e} {guess} {gamma}"] = next(iter(verification(parts, guess, [gamma + 1]).values()))
    return named


def target_head(
    parts: Parts, blocks: Callable[[], object], head: Callable[[], object], positions: int
) -> Callable[[], object]:
    return lambda: (parts.harvest(positions), blocks(), head())


def overlap(model: MultiExitModel, cell: dict[str, Any], repeats: int) -> tuple[float, float]:
    """Seconds of the target's rest and the worker's branches at the same time, and of the longer one alone."""
    target, worker = Parts(model, 1, 64), Parts(model, cell["branches"], 64)
    rest = next(iter(verification(target, cell["guess_exit"], [cell["gamma"] + 1]).values()))
    early, head = early_step(worker, cell["exit"], 1), worker.head(cell["exit"])

    def branches() -> None:
        with torch.inference_mode():
            for _ in range(cell["gamma"]):
                early()
                head()
            early()

    with threads(1), ThreadPoolExecutor(1) as pool:

        def both() -> None:
            ahead = pool.submit(branches)
            rest()
            ahead.result()

        found = medians({"both": both, "rest": rest, "branches": branches}, repeats)
    return found["both"], max(found["rest"], found["branches"])
