"""One round of self-speculation: tokens grow at the shallow exits, and every deeper level takes some of them back.

A level's logits judge the tokens in the slots it has just been advanced over: what falls is cut off, and one token of
the level's own is put behind what stands. So a block runs once over a slot, unless the token in it was taken back.

Source: LayerSkip (arXiv 2404.16710), whose loop this is for one exit; here levels nest, and rows have own lengths.

Shape suffixes: ``B`` rows, ``W`` positions of a window, ``K = W - 1`` drafts in it, ``C`` columns of the round (slots
from a row's first incomplete one on), ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eetrain.decoding.speculation.acceptance import Verdict, draw, verify_greedily, verify_sampled
from eetrain.decoding.speculation.levels import Advance, DraftLevels
from eetrain.decoding.speculation.processors import DraftScores
from eetrain.decoding.speculation.rows import RaggedRows
from eetrain.decoding.speculation.stopping import DraftStop


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen from logits.

    Attributes:
        scores: processes logits.
        samples: whether tokens are drawn, or the likeliest one is taken.
        ends: tokens that end a row.
    """

    scores: DraftScores
    samples: bool = False
    ends: Collection[int] = ()

    @classmethod
    def greedy(cls, num_rows: int) -> Choice:
        """The likeliest token, logits as they are."""
        return cls(DraftScores([], num_rows))


@dataclass(frozen=True)
class Judgement:
    """What a level made of the tokens in its window.

    Attributes:
        logits_BWV: raw; position ``w`` of a row predicts the token ``w + 1`` slots after the window's first.
        scores_BWV: processed.
        drafted: tokens of each row that were judged or cut.
        accepted: those that stand.
        stopped: rows in which nothing was put behind them.
    """

    logits_BWV: Tensor
    scores_BWV: Tensor
    drafted: list[int]
    accepted: list[int]
    stopped: set[int]


class DraftRound:
    """Grow every row by drafts, then verify them.

    Args:
        rows: whose tokens and cache are worked on.
        choice: how tokens are chosen, at every level.
        stop: ends drafts of the first exit early.
        exits: that draft, shallowest first.
        lengths: of each exit's drafts.
        room: how many tokens each row may gain.

    Attributes:
        drafted_by: of each row, for every token it has gained, the exit that drafted it, 0 for the full depth's own.
    """

    def __init__(
        self,
        rows: RaggedRows,
        choice: Choice,
        stop: DraftStop,
        exits: Sequence[int],
        lengths: Sequence[int],
        room: Sequence[int],
    ) -> None:
        self.rows, self.choice, self.stop, self.lengths = rows, choice, stop, tuple(lengths)
        self.levels = DraftLevels(rows, exits, 1 + sum(length + 1 for length in lengths))
        self.drafted_by: list[list[int]] = [[] for _ in room]
        self._confidences: list[list[float]] = [[] for _ in room]
        # The full depth adds a token of its own, so one less is drafted.
        self._most = [slots + max(1, tokens) for slots, tokens in zip(self.levels.base, room, strict=True)]
        self._q_BCV: Tensor | None = None

    def draft(self) -> None:
        """Let the deepest exit approve as many tokens as its drafts are long, where there is room."""
        base = self.levels.base
        goals = [min(slots + 1 + self.lengths[-1], most) for slots, most in zip(base, self._most, strict=True)]
        self._grow(len(self.lengths) - 1, goals)

    def verify(self) -> Judgement:
        """Run the remaining blocks over what was drafted; keep what stands and one token more."""
        judgement = self._judge(len(self.lengths), set(range(len(self.drafted_by))))
        self.rows.complete = [known - 1 for known in self.levels.known]
        return judgement

    def _grow(self, level: int, goals: list[int]) -> None:
        """Approve tokens at ``level`` until each row has its goal of known slots, or its draft is stopped."""
        known, newest = self.levels.known, self.rows.newest
        going = set(range(len(goals)))
        while True:
            going = {row for row in going if known[row] < goals[row] and newest[row] not in self.choice.ends}
            if not going:
                return
            if level:
                length = self.lengths[level - 1]
                inner = [min(slots + length, most) for slots, most in zip(known, self._most, strict=True)]
                self._grow(level - 1, [inner[row] if row in going else known[row] for row in range(len(known))])
            going -= self._judge(level, going).stopped

    def _judge(self, level: int, rows: set[int]) -> Judgement:
        """Advance a level, and cut or extend ``rows`` by its logits; the others stay as they are."""
        levels = self.levels
        before = list(levels.reached[level])
        drafted = [levels.known[row] - before[row] - 1 if row in rows else 0 for row in range(len(before))]
        advance = levels.advance(level)
        assert advance is not None, "there is always the newest token"
        logits_BWV = self._logits(level, advance)
        scores_BWV = self.choice.scores(logits_BWV, self.rows.ids, advance.first)
        verdict = self._verdict(advance, scores_BWV, drafted)
        accepted = verdict.accepted.tolist()
        stopped = self._stops(scores_BWV, rows) if level == 0 else set()
        if level == 1:
            self._learn(rows, accepted)
        self._put(level, rows - stopped, advance, verdict, accepted)
        return Judgement(logits_BWV, scores_BWV, drafted, accepted, stopped)

    def _logits(self, level: int, advance: Advance) -> Tensor:
        if level == len(self.lengths):
            return self.rows.full_logits(advance.state_BWD)
        layer, features_BWD = self.levels.depths[level], advance.features_BWD
        if features_BWD is None:
            features_BWD = self.rows.features(layer, advance.state_BWD, advance.harvest)
        return self.rows.exit_logits(layer, features_BWD)

    def _verdict(self, advance: Advance, scores_BWV: Tensor, drafted: list[int]) -> Verdict:
        drafts_BK = self._drafts(advance) if advance.width > 1 else None
        counts_B = torch.tensor(drafted, device=scores_BWV.device)
        if not self.choice.samples:
            if drafts_BK is None:
                return Verdict(counts_B, scores_BWV[:, 0].argmax(dim=-1))
            return verify_greedily(scores_BWV, drafts_BK, counts_B)
        p_BWV = scores_BWV.softmax(dim=-1)
        verdict = Verdict(counts_B, draw(p_BWV[:, 0]))
        if drafts_BK is not None:
            verdict = verify_sampled(p_BWV, self._q(advance)[:, :-1], drafts_BK, counts_B)
        self._keep_q(advance, p_BWV)
        return verdict

    def _drafts(self, advance: Advance) -> Tensor:
        ahead_K = torch.arange(1, advance.width, device=advance.first_B.device)
        return self.rows.ids.gather(1, advance.first_B[:, None] + ahead_K)

    def _place_q(self, advance: Advance) -> Tensor:
        """Columns of the tokens that the window's positions predict, ``[B, W]``; the last one is for those unseen."""
        assert self._q_BCV is not None, "drafts are drawn before they are verified"
        base_B = torch.tensor(self.levels.base, device=advance.first_B.device)
        ahead_W = torch.arange(1, advance.width + 1, device=base_B.device)
        return ((advance.first_B - base_B)[:, None] + ahead_W).clamp(max=self._q_BCV.shape[1] - 1)

    def _q(self, advance: Advance) -> Tensor:
        place_BW = self._place_q(advance)
        assert self._q_BCV is not None
        return self._q_BCV.gather(1, place_BW[..., None].expand(-1, -1, self._q_BCV.shape[-1]))

    def _keep_q(self, advance: Advance, p_BWV: Tensor) -> None:
        """Remember what this level's tokens are distributed by: those that stand are, too."""
        if self._q_BCV is None:
            self._q_BCV = p_BWV.new_zeros(len(p_BWV), self.levels.columns + 2, p_BWV.shape[-1])
        place_BW = self._place_q(advance)
        self._q_BCV.scatter_(1, place_BW[..., None].expand_as(p_BWV), p_BWV)

    def _stops(self, scores_BWV: Tensor, rows: set[int]) -> set[int]:
        """Rows whose draft ends here: their exit is not sure enough, and its choice is not used."""
        sure = [1.0] * len(self.drafted_by)
        if self.stop.asks_confidence:
            scores_BV = scores_BWV[:, 0]
            sure = torch.exp(scores_BV.amax(dim=-1) - scores_BV.logsumexp(dim=-1)).tolist()
        stopped = set()
        for row in sorted(rows):
            if self.stop.keeps(sure[row], len(self._confidences[row])):
                self._confidences[row].append(sure[row])
            else:
                stopped.add(row)
        return stopped

    def _learn(self, rows: set[int], accepted: list[int]) -> None:
        """Tell the stopping rule what the next level made of the first exit's drafts."""
        for row in sorted(rows):
            if self._confidences[row]:
                self.stop.observe(self._confidences[row], accepted[row])
            self._confidences[row] = []

    def _put(self, level: int, rows: set[int], advance: Advance, verdict: Verdict, accepted: list[int]) -> None:
        """Cut rows behind what stands, and put the level's own token there."""
        levels = self.levels
        slots = [
            advance.first[row] + accepted[row] + 1 if row in rows else levels.known[row]
            for row in range(len(self.drafted_by))
        ]
        # Rows that stay as they are get a token behind their end, where nobody looks.
        place_B1 = torch.tensor(slots, device=self.rows.ids.device)[:, None]
        self.rows.ids.scatter_(1, place_B1, verdict.tokens[:, None])
        tokens = verdict.tokens.tolist()
        for row in rows:
            levels.put(row, slots[row] + 1, level)
            self.rows.newest[row] = tokens[row]
            gained = slots[row] - levels.base[row] - 1
            own = levels.depths[level] if level < len(self.lengths) else 0
            self.drafted_by[row] = [*self.drafted_by[row][:gained], own]
