"""Times of the parts of a decoding step on this machine: blocks, heads and tail, on one or several positions.

Each part is run alone, some times on end, against a cache that holds a context; the parts take turns, so that a machine
that slows down slows all of them, and medians are reported. Seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eetrain import MultiExitModel
from eetrain.backbones import Harvest, Harvester
from eetrain.decoding.cache import SlotCache, Window

_BURST = 4


@dataclass
class Parts:
    """A model about to decode ``rows`` rows that hold ``context`` tokens each."""

    model: MultiExitModel
    rows: int
    context: int

    def __post_init__(self) -> None:
        self.harvester = Harvester(self.model.backbone, self.model.anatomy)
        self.cache = SlotCache(self.model.num_blocks + len(self.model.exit_layers))
        self.norm, self.projection = self.model.shared_tail()
        vocabulary = self.model.causal_lm.get_input_embeddings().num_embeddings
        self.ids = torch.randint(vocabulary, (self.rows, self.context), generator=torch.Generator().manual_seed(0))
        harvest = self._harvest(Window(0, self.context), self.ids)
        self.harvester.run(harvest, harvest.hidden_BTD, range(1, self.model.num_blocks + 1))

    def harvest(self, positions: int) -> Harvest:
        """What surrounds the blocks: embedding, mask, rotary tables."""
        return self._harvest(Window(self.context, self.context + positions), self.ids[:, :1].expand(-1, positions))

    def blocks(self, first: int, last: int, positions: int) -> Callable[[], Tensor]:
        harvest = self.harvest(positions)
        state, numbers = harvest.hidden_BTD.clone(), range(first, last + 1)
        window = self.cache.window

        def run() -> Tensor:
            self.cache.window = window  # other parts have set theirs since
            return self.harvester.run(harvest, state, numbers)

        return run

    def head(self, layer: int, positions: int = 1) -> Callable[[], Tensor]:
        """An exit's head with the choice of the token; a head with attention writes to its own cache."""
        harvest, head = self.harvest(positions), self.model.head(layer)
        state, window = harvest.hidden_BTD.clone(), self.cache.window
        project = head.projection(self.projection)

        def run() -> Tensor:
            self.cache.window = window
            return project(head(state, self.model.head_call(layer, harvest), self.norm)).argmax(-1)

        return run

    def tail(self, positions: int) -> Callable[[], Tensor]:
        state = self.harvest(positions).hidden_BTD.clone()
        return lambda: self.projection(self.norm(state)).argmax(-1)

    def _harvest(self, window: Window, ids: Tensor) -> Harvest:
        self.cache.window = window
        places = torch.arange(window.first, window.last).expand(self.rows, -1)
        mask = torch.ones(self.rows, window.last, dtype=torch.long)
        return self.harvester(ids, attention_mask=mask, position_ids=places, cache=self.cache)


def medians(parts: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each part, run some times on end as decoding does: a few blocks then find their weights in the cache.

    Of each burst the first run does not count.
    """
    spent: dict[str, list[float]] = {name: [] for name in parts}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, run in parts.items():
                run()
                began = time.perf_counter()
                for _ in range(_BURST):
                    run()
                spent[name].append((time.perf_counter() - began) / _BURST)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def line(points: dict[int, float]) -> tuple[float, float]:
    """Least squares: value at 1 and rise a position, which noise must not turn negative."""
    if len(points) == 1:
        return next(iter(points.values())), 0.0
    fit = statistics.linear_regression(list(points), list(points.values()))
    if fit.slope <= 0:
        return statistics.mean(points.values()), 0.0
    return max(fit.intercept + fit.slope, min(points.values()) / 2), fit.slope


def verification(parts: Parts, after: int, widths: Sequence[int]) -> dict[str, Callable[[], object]]:
    """Blocks after an exit and the tail, on each of these numbers of positions."""
    found: dict[str, Callable[[], object]] = {}
    for width in widths:
        blocks, tail = parts.blocks(after + 1, parts.model.num_blocks, width), parts.tail(width)
        found[f"verify {after} {width}"] = lambda blocks=blocks, tail=tail: (blocks(), tail())
    return found
