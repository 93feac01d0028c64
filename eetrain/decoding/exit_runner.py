"""Decoding with exits: which (block, row, slot) is computed when, so that each one is present or declared missing.

Every row of the batch has its own depth at every token. ``reached[b][r]`` says how many slots of row ``r`` have run
through block ``b``; as a token takes all waiting tokens along when it goes deeper, these slots are a prefix. Rows
that go on after an exit are run as a batch of their own, over the window of slots that any of them still lacks.

Shape suffixes: ``B`` rows still running, ``R`` rows of the current call, ``W`` slots of its window, ``T`` all slots
so far, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eetrain.backbones import Call, Harvest, call_block
from eetrain.decoding.cache import KeysStoredError, Window
from eetrain.decoding.confidence import Evidence
from eetrain.decoding.policy import ExitPolicy
from eetrain.decoding.runner import StepRunner
from eetrain.errors import UnsupportedModelError
from eetrain.exits.gating import gate_features

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


@dataclass(frozen=True)
class _Current:
    """The rows and slots in flight within one step."""

    window: Window
    harvest: Harvest
    state_RWD: Tensor


class ExitRunner(StepRunner):
    """Run a multi-exit model under a policy that tests exits.

    Args:
        model: in eval mode.
        policy: decides depths.
        input_ids: prompts ``[B, T]``, left-padded.
        attention_mask: ``[B, T]`` or ``None`` when nothing is padded.
        position_ids: ``[B, T]`` or ``None`` for ``0..T-1``.
    """

    def __init__(
        self,
        model: MultiExitModel,
        policy: ExitPolicy,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        super().__init__(model, input_ids, attention_mask, position_ids)
        self.policy = policy
        self.route = policy.route(model.exit_layers, model.num_blocks)
        self.reached = {bound: [0] * len(input_ids) for bound in self.route.boundaries}
        self.waiting_BTD: Tensor | None = None
        self.gates_passed: list[Tensor] = []  # of the rows running in this step, [R, K] an exit

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Run the prompts through all blocks of the route; return logits ``[B, V]`` and depths ``[B]``."""
        slots = self.ids.shape[1]
        window = Window(0, slots)
        harvest = self._harvest(window)
        state, start = harvest.hidden_BTD, 0
        for bound in self.route.boundaries:
            state = self.harvester.run(harvest, state, range(start + 1, bound + 1))
            if bound < self.route.end and self.model.head(bound).attends:
                self._features(bound, harvest, state)
            self.reached[bound] = [slots] * len(self.ids)
            start = bound
        logits = self._logits(self.route.end, harvest, state)
        return logits, torch.full((len(self.ids),), self.route.end, device=self.ids.device)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Feed one token a row ``[B]``; return the next logits ``[B, V]`` and the depth of each row ``[B]``."""
        self._append(tokens)
        running = list(range(len(self.ids)))
        logits = None
        depth = tokens.new_zeros(len(self.ids))
        current: _Current | None = None
        self.gates_passed = []
        for start, bound in pairwise((0, *self.route.boundaries)):
            if self.policy.repair == "propagate":
                self._fill(start, bound, running)
            current = self._enter(bound, running, current)
            state_RWD, previous_RD = self._run(current, start, bound)
            leaving, scores_RV = self._test(bound, current.harvest, state_RWD, previous_RD, running)
            if scores_RV is None:
                current = replace(current, state_RWD=state_RWD)
                continue
            rows = [running[place] for place in leaving]
            logits, depth = _place(logits, depth, rows, scores_RV, bound)
            staying = sorted(set(range(len(running))) - set(leaving))
            if not staying:
                break
            running = [running[place] for place in staying]
            self.gates_passed = [gates_RK[staying] for gates_RK in self.gates_passed]
            current = replace(current, state_RWD=state_RWD[staying])
        assert logits is not None
        return logits, depth

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only; the others have ended."""
        super().keep(rows)
        index = torch.tensor(rows, device=self.ids.device)
        self.waiting_BTD = None if self.waiting_BTD is None else self.waiting_BTD[index]
        self.reached = {bound: [slots[row] for row in rows] for bound, slots in self.reached.items()}

    def _window(self, bound: int, running: list[int], last: int | None = None) -> Window:
        """The slots that some running row still lacks at ``bound``, up to the newest or to ``last``."""
        last = self.ids.shape[1] if last is None else last
        lengths = [self.reached[bound][row] for row in running]
        first = min(lengths)
        rows = None if len(running) == len(self.ids) else torch.tensor(running, device=self.ids.device)
        if max(lengths) == first:
            return Window(first, last, rows)
        slots = torch.arange(first, last, device=self.ids.device)
        return Window(first, last, rows, slots >= torch.tensor(lengths, device=self.ids.device)[:, None])

    def _enter(self, bound: int, running: list[int], before: _Current | None) -> _Current:
        """The window, arguments and input states for the blocks up to ``bound``."""
        window = self._window(bound, running)
        if before is None:
            harvest = self._harvest(window)
            return _Current(window, harvest, harvest.hidden_BTD)
        at_hand = before.window.valid is None and window.first == before.window.first
        state_RWD = before.state_RWD if at_hand else self._waiting(window)
        if _same(window, before.window):
            self.cache.window = window
            return replace(before, state_RWD=state_RWD)
        return _Current(window, self._harvest(window), state_RWD)

    def _run(self, current: _Current, start: int, bound: int) -> tuple[Tensor, Tensor]:
        """Blocks ``start+1..bound``; also gives the last slot's state before the last of them."""
        window = current.window
        before = self.harvester.run(current.harvest, current.state_RWD, range(start + 1, bound))
        previous_RD = before[:, -1].clone()  # may be a view of the waiting states, which are about to be overwritten
        after = self.harvester.run(current.harvest, before, (bound,))
        for row in range(len(self.ids)) if window.rows is None else window.rows.tolist():
            self.block_calls += (bound - start) * (window.last - self.reached[bound][row])
            self.reached[bound][row] = window.last
        if bound < self.route.end:
            self._keep_waiting(after, window)
        return after, previous_RD

    def _keep_waiting(self, state_RWD: Tensor, window: Window) -> None:
        """Remember states at the deepest block reached, for the slots from the window on."""
        rows = slice(None) if window.rows is None else window.rows
        if self.waiting_BTD is None or self.waiting_BTD.shape[1] < window.last:
            grown = state_RWD.new_zeros(len(self.ids), 2 * window.last, state_RWD.shape[-1])
            if self.waiting_BTD is not None:
                grown[:, : self.waiting_BTD.shape[1]] = self.waiting_BTD
            self.waiting_BTD = grown
        slots = slice(window.first, window.last)
        if window.valid is not None:
            state_RWD = torch.where(window.valid[..., None], state_RWD, self.waiting_BTD[rows, slots])
        self.waiting_BTD[rows, slots] = state_RWD

    def _waiting(self, window: Window) -> Tensor:
        assert self.waiting_BTD is not None
        rows = slice(None) if window.rows is None else window.rows
        return self.waiting_BTD[rows, window.first : window.last]

    def _test(
        self, bound: int, harvest: Harvest, state_RWD: Tensor, previous_RD: Tensor, running: list[int]
    ) -> tuple[list[int], Tensor | None]:
        """Places in ``running`` that stop here, and their logits or ``None``; at the route's end all that are left."""
        if bound == self.route.end:
            return list(range(len(running))), self._logits(bound, harvest, state_RWD)
        features = self._features(bound, harvest, state_RWD)
        project = self.model.head(bound).projection(self.projection)
        evidence = Evidence(bound, state_RWD[:, -1], previous_RD, lambda: project(features[:, -1]), self._gates_RG)
        if self.policy.asks_gates:
            self._pass_gate(bound, evidence)
        leave = self.policy.leave(evidence).tolist()
        leaving = [place for place, row in enumerate(running) if leave[place] and self._may_wait(row)]
        if not leaving:
            return [], None
        return leaving, evidence.logits_RV if len(leaving) == len(running) else evidence.logits_RV[leaving]

    def _pass_gate(self, bound: int, evidence: Evidence) -> None:
        features_R4 = gate_features(evidence.logits_RV)
        # The gate judges the token that this position predicts.
        index_R = torch.full((len(features_R4),), self.ids.shape[1] - self.prompt_slots, device=self.ids.device)
        self.gates_passed.append(torch.sigmoid(self.model.gate(bound)(features_R4, index_R)))

    def _gates_RG(self, cost_weight: float | None) -> Tensor:
        assert self.model.config.gates is not None
        place = 0 if cost_weight is None else self.model.config.gates.cost_weights.index(cost_weight)
        return torch.stack([gates_RK[:, place] for gates_RK in self.gates_passed], dim=1)

    def _may_wait(self, row: int) -> bool:
        if self.policy.repair == "propagate":
            return True
        return self.ids.shape[1] - self.reached[self.route.end][row] <= self.policy.cap

    def _features(self, layer: int, harvest: Harvest, state_RWD: Tensor) -> Tensor:
        """Features of the last slot; a head with attention sees the whole window, as it keeps keys and values."""
        head = self.model.head(layer)
        state = state_RWD if head.attends else state_RWD[:, -1:]
        features: Tensor = head(state, self.model.head_call(layer, harvest), self.norm)
        return features[:, -1:]

    def _logits(self, layer: int, harvest: Harvest, state_RWD: Tensor) -> Tensor:
        if layer == self.model.num_blocks and not self._ends_at_exit(layer):
            return self.projection(self.norm(state_RWD[:, -1:]))[:, -1]
        projection = self.model.head(layer).projection(self.projection)
        return projection(self._features(layer, harvest, state_RWD))[:, -1]

    def _ends_at_exit(self, layer: int) -> bool:
        return self.policy.ends_at_exit and layer in self.model.exit_layers

    def _fill(self, start: int, bound: int, running: list[int]) -> None:
        """Project keys and values of blocks ``start+1..bound`` for tokens that left earlier, from their last state.

        This waits until a row goes that deep again: one call then serves all its waiting tokens.
        """
        window = self._window(bound, running, last=self.ids.shape[1] - 1)
        if window.first == window.last:
            return
        window = replace(window, store_only=True)
        harvest, state_RWD = self._harvest(window), self._waiting(window)
        for number in range(start + 1, bound + 1):
            _store(self.harvester.blocks[number - 1], state_RWD, harvest.calls[number - 1])
        if bound < self.route.end and self.model.head(bound).attends:
            inner = self.model.head(bound).inner
            assert inner is not None
            _store(inner, state_RWD, self.model.head_call(bound, harvest))
        for row in running:
            self.reached[bound][row] = window.last


def _store(block: nn.Module, state_RWD: Tensor, call: Call) -> None:
    try:
        call_block(block, state_RWD, call)
    except KeysStoredError:
        return
    raise UnsupportedModelError(
        f"{type(block).__name__} wrote no keys and values, so repair=propagate cannot fill them in.",
        hint="Use repair=recompute.",
    )


def _same(one: Window, two: Window) -> bool:
    if one.first != two.first or one.valid is not None or two.valid is not None:
        return False
    if one.rows is None or two.rows is None:
        return one.rows is two.rows
    return len(one.rows) == len(two.rows)  # rows only ever leave


def _place(
    logits: Tensor | None, depth: Tensor, rows: list[int], scores_RV: Tensor, bound: int
) -> tuple[Tensor, Tensor]:
    """Enter the results of the rows that stop at ``bound`` into those of all rows."""
    if len(rows) == len(depth):
        return scores_RV, torch.full_like(depth, bound)
    if logits is None:
        logits = scores_RV.new_zeros(len(depth), scores_RV.shape[-1])
    logits[rows], depth[rows] = scores_RV, bound
    return logits, depth
