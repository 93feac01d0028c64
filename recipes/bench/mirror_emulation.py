"""Mirror speculative decoding with a draft worker that really runs beside the target, for its tokens and hits.

Without caches: every pass runs the whole text. That is slow, and leaves nothing to go wrong between two threads but
the protocol itself. Times are measured part by part elsewhere (`block_times.py`).

Differences to arXiv 2510.13161: target and draft are one model on one device; the draft is an early exit, one token a
step instead of several; the guessing exit hands over its best tokens after every prefix of the window, not only after
the last, so that any number of accepted drafts can be met.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eetrain import MultiExitModel
from eetrain.backbones import Harvester

Branches = dict[tuple[int, int], list[int]]


@dataclass
class MirrorRun:
    """Tokens of one prompt, and for every round whose correction is among them whether its branch was there."""

    tokens: list[int] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)


class DraftWorker:
    """Greedy rollouts from an exit.

    Args:
        model: in eval mode.
        layer: the exit.
        gamma: tokens of a rollout.
    """

    def __init__(self, model: MultiExitModel, layer: int, gamma: int) -> None:
        self.model, self.layer, self.gamma = model, layer, gamma
        self.harvester = Harvester(model.backbone, model.anatomy)  # of its own: it records while the target's does
        self.norm, self.projection = model.shared_tail()

    @torch.inference_mode()
    def rollouts(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of texts of one length."""
        ids_RT, start = torch.tensor(texts, device=self.model.device), len(texts[0])
        for _ in range(self.gamma):
            harvest = self.harvester(ids_RT)
            state_RTD = self.harvester.run(harvest, harvest.hidden_BTD, range(1, self.layer + 1))
            logits_RV = exit_logits(self.model, self.layer, harvest, state_RTD, self.norm, self.projection)[:, -1]
            ids_RT = torch.cat([ids_RT, logits_RV.argmax(-1, keepdim=True)], 1)
        return ids_RT[:, start:].tolist()

    def branches(self, text: list[int], window: list[int], guesses: list[list[int]]) -> Branches:
        """A rollout for every guess after every prefix of the window."""
        found: Branches = {}
        for count, tokens in enumerate(guesses):
            drafts = self.rollouts([[*text, *window[:count], token] for token in tokens])
            found |= {(count, token): draft for token, draft in zip(tokens, drafts, strict=True)}
        return found


def exit_logits(model: MultiExitModel, layer: int, harvest, state_BTD: Tensor, norm, projection) -> Tensor:
    head = model.head(layer)
    return head.projection(projection)(head(state_BTD, model.head_call(layer, harvest), norm))


class Mirror:
    """The target, with a worker.

    Args:
        model: in eval mode.
        draft_exit: exit of the worker.
        guess_exit: exit whose guesses the worker expands.
        gamma: drafts a window.
        kappa: guesses a position.
    """

    def __init__(self, model: MultiExitModel, draft_exit: int, guess_exit: int, gamma: int, kappa: int) -> None:
        self.model, self.guess_exit, self.kappa = model, guess_exit, kappa
        self.worker = DraftWorker(model, draft_exit, gamma)
        self.harvester = Harvester(model.backbone, model.anatomy)
        self.norm, self.projection = model.shared_tail()

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int], new_tokens: int, ends: Collection[int] = ()) -> MirrorRun:
        """Greedy text after a prompt: at most `new_tokens`, up to the first of `ends`."""
        run, text, window = MirrorRun(), list(prompt), []
        with ThreadPoolExecutor(1) as pool:
            while len(run.tokens) < new_tokens:
                (count, correction), branches = self._round(pool, text, window)
                fresh = until([*window[:count], correction], new_tokens - len(run.tokens), ends)
                if window and len(fresh) > count:
                    run.hits.append((count, correction) in branches)
                run.tokens += fresh
                text += fresh
                if fresh[-1] in ends:
                    break
                ahead = branches.get((count, correction))
                window = pool.submit(self.worker.rollouts, [text]).result()[0] if ahead is None else ahead
        return run

    def _round(self, pool: ThreadPoolExecutor, text: list[int], window: list[int]) -> tuple[tuple[int, int], Branches]:
        """Accepted drafts and correction, and what the worker drafted meanwhile."""
        harvest = self.harvester(torch.tensor([[*text, *window]], device=self.model.device))
        state = self.harvester.run(harvest, harvest.hidden_BTD, range(1, self.guess_exit + 1))
        judged = slice(len(text) - 1, None)
        logits = exit_logits(self.model, self.guess_exit, harvest, state, self.norm, self.projection)[0, judged]
        ahead = pool.submit(self.worker.branches, list(text), window, logits.topk(self.kappa).indices.tolist())
        state = self.harvester.run(harvest, state, range(self.guess_exit + 1, self.model.num_blocks + 1))
        best = self.projection(self.norm(state))[0, judged].argmax(-1).tolist()
        count = next((n for n, draft in enumerate(window) if draft != best[n]), len(window))
        return (count, best[count]), ahead.result()


def until(tokens: list[int], most: int, ends: Collection[int]) -> list[int]:
    """Up to the first end of text, and so many at most."""
    last = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: min(most, last)]
