"""Decoding by self-speculation: a prompt at full depth, then rounds of drafts and their verification.

Every row has its own length: its tokens, keys and values lie in the slots from the prompt's first on, without gaps, and
masks are made for each row. Nothing is cropped: slots behind a row's end are written anew before they are seen.

Shape suffixes: ``B`` rows still running, ``T`` slots of the prompt, ``W`` positions of a window, ``N`` slots,
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eetrain.backbones import Harvest, Harvester, check_ragged, decoder_of
from eetrain.decoding.cache import Window
from eetrain.decoding.draft_levels import Advance
from eetrain.decoding.draft_round import DraftRound
from eetrain.decoding.draftable import DraftScores
from eetrain.decoding.runner import Runner
from eetrain.decoding.speculative import AUTO, Speculation, Speculative, memory_of
from eetrain.errors import ConfigError, UnsupportedModelError

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
        ids: tokens by slot ``[B, N]``, with room behind each row's end.
        complete: slots of each row that all blocks have run over.
        newest: the token of each row behind these.
        ends: tokens that end a row.
        samples: whether tokens are drawn.
        scores: processes logits of drafts.
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
        self.decoder_config = decoder_of(model.backbone, model.anatomy).config
        check_model(model, policy)
        self.hidden_dtype = next(model.backbone.parameters()).dtype
        self._limit: int | None = getattr(self.decoder_config, "max_position_embeddings", None)
        rows, slots = input_ids.shape
        self.complete = [slots] * rows
        self.newest = [0] * rows
        self.visible = input_ids.new_ones(rows, slots).bool() if attention_mask is None else attention_mask.bool()
        self._offset_B1 = self.positions[:, -1:] - (slots - 1)
        self._harvesters = {model.num_blocks: self.harvester}
        self.memory = memory_of(model, policy)
        self.stop = self.memory.stop
        self.ends: Collection[int] = ()
        self.samples = False
        self.scores = DraftScores([], rows)
        self.speculation = Speculation()

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Run the prompts through all blocks; return logits ``[B, V]`` and depths ``[B]``."""
        harvest = self._harvest(Window(0, self.prompt_slots))
        state_BTD, start = harvest.hidden_BTD, 0
        for layer in self._exits_with_keys():
            state_BTD = self.harvester.run(harvest, state_BTD, range(start + 1, layer + 1))
            self.features(layer, state_BTD, harvest)
            start = layer
        state_BTD = self.harvester.run(harvest, state_BTD, range(start + 1, self.model.num_blocks + 1))
        logits_BV = self.projection(self.norm(state_BTD[:, -1:]))[:, -1]
        return logits_BV, torch.full((len(self.ids),), self.model.num_blocks, device=self.ids.device)

    def feed(self, tokens: Tensor) -> None:
        """Put the first token ``[B]`` behind each prompt."""
        self.reserve(self.prompt_slots + 1)
        self.ids[:, self.prompt_slots] = tokens
        self.newest = tokens.tolist()

    def round(self, room: Sequence[int]) -> Gained:
        """Draft and verify once.

        Args:
            room: how many tokens each row may gain, at least 1; more may come and are to be dropped with the row.
        """
        before = list(self.complete)
        exits, lengths = self._plan()
        began = perf_counter()
        drafts = DraftRound(self, exits, lengths, room)
        drafts.draft()
        drafted = perf_counter()
        judgement = drafts.verify()
        judged = [min(stood + 1, all_) for stood, all_ in zip(judgement.accepted, judgement.drafted, strict=True)]
        if self.policy.exit == AUTO:
            seconds = drafted - began, perf_counter() - drafted
            self.memory.tuner.observe(exits[0], max(judgement.drafted), seconds, sum(judged), sum(judgement.accepted))
        self.speculation += Speculation(1, len(room), sum(judgement.drafted), sum(judged), sum(judgement.accepted))
        counts = [now - then for now, then in zip(self.complete, before, strict=True)]
        return Gained(counts, drafts.drafted_by, judgement.logits_BWV, judgement.scores_BWV)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only; the others have ended."""
        super().keep(rows)
        index = torch.tensor(rows, device=self.ids.device)
        self.visible, self._offset_B1 = self.visible[index], self._offset_B1[index]
        self.complete = [self.complete[row] for row in rows]
        self.newest = [self.newest[row] for row in rows]
        self.scores.keep(rows)

    def reserve(self, slots: int) -> None:
        """Make room for tokens up to slot ``slots``."""
        missing = slots - self.ids.shape[1]
        if missing > 0:
            rows, grown = self.ids.shape[0], max(missing, self.ids.shape[1])
            self.ids = torch.cat([self.ids, self.ids.new_zeros(rows, grown)], dim=1)
            self.visible = torch.cat([self.visible, self.visible.new_ones(rows, grown)], dim=1)

    def positions_in(self, slot_BC: Tensor) -> Tensor:
        """Position ids of slots; those beyond the model's positions, which no token keeps, get the last one."""
        positions = slot_BC + self._offset_B1
        return positions if self._limit is None else positions.clamp(max=self._limit - 1)

    def harvester_to(self, depth: int) -> Harvester:
        """Harvests for blocks ``1..depth``."""
        attends = depth in self.model.exit_layers and self.model.head(depth).attends
        depth = self.model.num_blocks if attends else depth  # its block was copied from the last one
        if depth not in self._harvesters:
            self._harvesters[depth] = Harvester(self.model.backbone, self.model.anatomy, depth)
        return self._harvesters[depth]

    def features(self, layer: int, state_BWD: Tensor, harvest: Harvest) -> Tensor:
        """States behind exit ``layer``, through its head up to the output matrix."""
        features_BWD: Tensor = self.model.head(layer)(state_BWD, self.model.head_call(layer, harvest), self.norm)
        return features_BWD

    def exit_logits(self, layer: int, advance: Advance) -> Tensor:
        """Raw logits ``[B, W, V]`` of exit ``layer`` over a window."""
        features_BWD = advance.features_BWD
        if features_BWD is None:
            features_BWD = self.features(layer, advance.state_BWD, advance.harvest)
        return self.model.head(layer).projection(self.projection)(features_BWD)

    def full_logits(self, advance: Advance) -> Tensor:
        """Raw logits ``[B, W, V]`` of the full depth over a window."""
        return self.projection(self.norm(advance.state_BWD))

    def _plan(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(self.policy.exit, str):
            layer, length = self.memory.tuner.choose(self.policy.candidates(self.model))
            return (layer,), (length,)
        return self.policy.exit, self.policy.lengths(self.policy.exit)

    def _exits_with_keys(self) -> list[int]:
        exits = self.policy.candidates(self.model) if isinstance(self.policy.exit, str) else self.policy.exit
        return [layer for layer in exits if self.model.head(layer).attends]


def check_model(model: MultiExitModel, policy: Speculative) -> None:
    """Find out whether a backbone can run rows of unequal length, and whether drafts fit its positions.

    Raises:
        UnsupportedModelError: it cannot.
        ConfigError: a draft is longer than the cache may get.
    """
    config = decoder_of(model.backbone, model.anatomy).config
    check_ragged(config)
    if not model.anatomy.takes_position_ids:
        raise UnsupportedModelError(
            f"{type(model.causal_lm).__name__} takes no position ids, which rows of unequal length need.",
            hint="Use another policy.",
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and sum(policy.draft) >= limit:
        raise ConfigError(
            f"Exit policy {policy} drafts {sum(policy.draft)} tokens, but the model has {limit} positions.",
            hint="Lower draft; 2 to 8 is usual.",
        )
