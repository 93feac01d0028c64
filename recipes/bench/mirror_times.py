"""Times of what Mirror speculative decoding, trees and chains of drafts are made of, on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
from block_times import Parts, line, medians, verification
from mirror_model import TreeCosts

from eetrain import MultiExitModel
from eetrain.evaluation.speed_model import RoundCosts

ROWS = (1, 2, 4, 8, 16, 32, 64)
Grid = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
"""Draft exits, guess exits, gammas, kappas."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def faster_threads(
    model: MultiExitModel, exits: Sequence[int], gammas: Sequence[int], context: int, repeats: int
) -> tuple[int, dict[int, TreeCosts]]:
    """One thread or all that torch has: which decodes the full depth faster, and the costs with it."""
    found = {}
    for number in sorted({1, torch.get_num_threads()}):
        with threads(number):
            found[number] = {layer: tree_costs(model, layer, gammas, context, repeats) for layer in exits}
    return min(found.items(), key=lambda item: mean(cost.chain.full for cost in item[1].values()))


def tree_costs(model: MultiExitModel, layer: int, gammas: Sequence[int], context: int, repeats: int) -> TreeCosts:
    """With the threads torch has now; verification up to the positions of the largest trees."""
    parts = Parts(model, 1, context)
    named: dict[str, Callable[[], object]] = {}
    few, widths = (1, 2, 4), sorted({gamma + 1 for gamma in gammas} | {2 * max(gammas) + 1})
    for width in few:
        named[f"early {width}"] = early_step(parts, layer, width)
        named[f"head {width}"] = parts.head(layer, width)
    blocks, tail = parts.blocks(1, model.num_blocks, 1), parts.tail(1)
    named["full"] = lambda: (parts.harvest(1), blocks(), tail())
    found = medians(named | verification(parts, layer, widths), repeats)
    _, early_more = line({width: found[f"early {width}"] for width in few})
    _, head_more = line({width: found[f"head {width}"] for width in few})
    verified = {width: found[f"verify {layer} {width}"] for width in widths}
    verify, more = line(verified)
    chain = RoundCosts(found["early 1"], found["head 1"], verify, more, found["full"])
    return TreeCosts(chain, early_more, head_more, verified)


def early_step(parts: Parts, layer: int, positions: int) -> Callable[[], object]:
    blocks = parts.blocks(1, layer, positions)
    return lambda: (parts.harvest(positions), blocks())


def draft_times(model: MultiExitModel, layer: int, context: int, repeats: int) -> list[dict[int, float]]:
    """Rows of a batch -> time of an early step, and of its head."""
    named: dict[str, Callable[[], object]] = {}
    for rows in ROWS:
        parts = Parts(model, rows, context)
        named[f"early {rows}"], named[f"head {rows}"] = early_step(parts, layer, 1), parts.head(layer)
    found = medians(named, repeats)
    return [{rows: found[f"{name} {rows}"] for rows in ROWS} for name in ("early", "head")]


def target_times(model: MultiExitModel, grid: Grid, context: int, repeats: int) -> dict[Any, list[float]]:
    """(Draft exit, guess exit, gamma) -> time of what runs up to the guesses, and after them."""
    parts = Parts(model, 1, context)
    named: dict[str, Callable[[], object]] = {}
    cells = [cell for cell in itertools.product(*grid[:3]) if cell[1] >= cell[0]]
    for e, guess, gamma in cells:
        between_exits, head = parts.blocks(e + 1, guess, gamma + 1), parts.head(guess, gamma + 1)
        named[f"head {e} {guess} {gamma}"] = target_head(parts, between_exits, head, gamma + 1)
        rest = verification(parts, guess, [gamma + 1])
        named[f"rest {e} {guess} {gamma}"] = next(iter(rest.values()))
    found = medians(named, repeats)
    return {cell: [found[" ".join(map(str, (name, *cell)))] for name in ("head", "rest")] for cell in cells}


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
