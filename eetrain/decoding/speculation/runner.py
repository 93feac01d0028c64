"""Decoding by self-speculation: a prompt at full depth, then rounds of drafts and their verification.

Shape suffixes: ``B`` rows still running, ``T`` slots of the prompt, ``W`` positions of a window, ``D`` hidden size,
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eetrain.decoding.cache import Window
from eetrain.decoding.runner import Runner
from eetrain.decoding.speculation.policy import AUTO, Speculation, Speculative, memory_of
from eetrain.decoding.speculation.round import Choice, DraftRound, Judgement
from eetrain.decoding.speculation.rows import RaggedRows
from eetrain.errors import ConfigError

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


@dataclass(frozen=True)
class Gained:
    """What a round brought.

    Attributes:
        counts: new tokens of each row, at least 1.
        drafted_by: of each row, for every new token, the exit that drafted it, 0 for the full depth's own.
        logits_BWV: raw logits that the new tokens are greedy in, or drawn by; rows are filled up.
        scores_BWV: the same, processed.
    """

    counts: list[int]
    drafted_by: list[list[int]]
    logits_BWV: Tensor
    scores_BWV: Tensor


class SpeculativeRunner(Runner):
    """Run a model by drafting and verifying.

    Args:
        model: in eval mode, whole.
        policy: which exits draft, and how long.
        input_ids: prompts ``[B, T]``, left-padded.
        attention_mask: ``[B, T]`` or ``None`` when nothing is padded.
        position_ids: ``[B, T]`` or ``None`` for ``0..T-1``.

    Attributes:
        rows: their tokens, lengths and cache.
        choice: how tokens are chosen from logits; greedily at first.
        speculation: counts so far.

    Raises:
        UnsupportedModelError: the backbone cannot run rows of unequal length.
        ConfigError: a draft that does not fit the model's positions.
    """

    def __init__(
        self,
        model: MultiExitModel,
        policy: Speculative,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        super().__init__(model, input_ids, attention_mask, position_ids)
        self.policy = policy
        self.rows = RaggedRows(model, self.cache, input_ids, attention_mask, self.positions)
        self._check_length()
        self.memory = memory_of(model, policy)
        self.choice = Choice.greedy(len(input_ids))
        self.speculation = Speculation()

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Run the prompts through all blocks; return logits ``[B, V]`` and depths ``[B]``."""
        harvest = self._harvest(Window(0, self.prompt_slots))
        state_BTD, start = harvest.hidden_BTD, 0
        for layer in self._exits_with_keys():
            state_BTD = self.harvester.run(harvest, state_BTD, range(start + 1, layer + 1))
            self.rows.features(layer, state_BTD, harvest)
            start = layer
        state_BTD = self.harvester.run(harvest, state_BTD, range(start + 1, self.model.num_blocks + 1))
        logits_BV = self.rows.full_logits(state_BTD[:, -1:])[:, -1]
        return logits_BV, torch.full((len(self.ids),), self.model.num_blocks, device=self.ids.device)

    def feed(self, tokens: Tensor) -> None:
        """Put the first token ``[B]`` behind each prompt."""
        self.rows.reserve(self.prompt_slots + 1)
        self.rows.ids[:, self.prompt_slots] = tokens
        self.rows.newest = tokens.tolist()

    def round(self, room: Sequence[int]) -> Gained:
        """Draft and verify once.

        Args:
            room: how many tokens each row may gain, at least 1; more may come and are to be dropped with the row.
        """
        before = list(self.rows.complete)
        exits, lengths = self._plan()
        began = perf_counter()
        drafts = DraftRound(self.rows, self.choice, self.memory.stop, exits, lengths, room)
        drafts.draft()
        drafted = perf_counter()
        judgement = drafts.verify()
        self._count(exits, judgement, (drafted - began, perf_counter() - drafted))
        self.block_calls = self.rows.block_calls
        counts = [now - then for now, then in zip(self.rows.complete, before, strict=True)]
        return Gained(counts, drafts.drafted_by, judgement.logits_BWV, judgement.scores_BWV)

    def newest_tokens(self, row: int, count: int) -> list[int]:
        """The last ``count`` tokens of a row."""
        end = self.rows.complete[row] + 1
        tokens: list[int] = self.rows.ids[row, end - count : end].tolist()
        return tokens

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only; the others have ended."""
        super().keep(rows)
        self.rows.keep(rows, torch.tensor(rows, device=self.ids.device))
        self.choice.scores.keep(rows)

    def _count(self, exits: tuple[int, ...], judgement: Judgement, seconds: tuple[float, float]) -> None:
        accepted, drafted = judgement.accepted, judgement.drafted
        judged = sum(min(stood + 1, all_) for stood, all_ in zip(accepted, drafted, strict=True))
        self.speculation += Speculation(1, len(accepted), sum(drafted), judged, sum(accepted))
        if self.policy.exit == AUTO:
            self.memory.tuner.observe(exits[0], max(drafted), seconds, judged, sum(accepted))

    def _plan(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(self.policy.exit, str):
            layer, length = self.memory.tuner.choose(self.policy.candidates(self.model))
            return (layer,), (length,)
        return self.policy.exit, self.policy.lengths(self.policy.exit)

    def _exits_with_keys(self) -> list[int]:
        exits = self.policy.candidates(self.model) if isinstance(self.policy.exit, str) else self.policy.exit
        return [layer for layer in exits if self.model.head(layer).attends]

    def _check_length(self) -> None:
        limit = getattr(self.rows.config, "max_position_embeddings", None)
        longest = sum(self.policy.draft)
        if limit is not None and longest >= limit:
            raise ConfigError(
                f"Exit policy {self.policy} drafts {longest} tokens, but the model has {limit} positions.",
                hint="Lower draft; 2 to 8 is usual.",
            )
