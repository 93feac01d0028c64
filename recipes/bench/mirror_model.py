"""Arithmetic of Mirror speculative decoding and of draft trees, on traces and measured times; no model runs here.

A text's new tokens are numbered from 0; `start` is the number of the token that a round's first draft stands for, so
everything before it is committed. `kappa` guesses a position, `gamma` drafts a round, as in arXiv 2510.13161.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from eetrain.evaluation.speed_model import RoundCosts

Kind = Literal["none", "first", "unsure", "every"]


@dataclass(frozen=True)
class Rollout:
    """What an exit drafts from one start.

    Attributes:
        guesses: best tokens of every draft position, the draft itself first.
        confidence: probability of each draft.
    """

    guesses: tuple[tuple[int, ...], ...]
    confidence: tuple[float, ...]


@dataclass(frozen=True)
class Text:
    """One prompt's greedy text.

    Attributes:
        truth: its new tokens, those of the full depth.
        ranks: exit -> how many tokens that exit prefers to each of `truth`, given the text before it.
        rollouts: exit -> its rollout from every start.
    """

    truth: tuple[int, ...]
    ranks: dict[int, tuple[int, ...]]
    rollouts: dict[int, tuple[Rollout, ...]]


@dataclass(frozen=True)
class Round:
    """One round of a walk through a text.

    Attributes:
        start: see above.
        accepted: drafts of the chain that were right.
        tokens: committed.
        whole: whether the text went on long enough for a token of the full depth after the accepted ones.
    """

    start: int
    accepted: int
    tokens: int
    whole: bool


@dataclass(frozen=True)
class Tree:
    """Second and further guesses beside the chain of drafts.

    Attributes:
        kind: `none`; `first`: beside the first draft; `unsure`: beside the least confident draft, once all are known
            (delayed expansion); `every`: beside all drafts.
        width: guesses at such a position, the chain's own included.
        grown: whether a further guess gets drafts of its own, down to the depth of the chain; not for `every`.
    """

    kind: Kind
    width: int = 2
    grown: bool = False

    def positions(self, rollout: Rollout, gamma: int) -> tuple[int, ...]:
        """Where it branches."""
        if self.kind == "none":
            return ()
        if self.kind == "first":
            return (0,)
        chain = range(gamma)
        return tuple(chain) if self.kind == "every" else (min(chain, key=lambda place: rollout.confidence[place]),)


CHAIN = Tree("none")


def accepted(text: Text, layer: int, start: int, gamma: int) -> int:
    """Drafts of a chain that are right."""
    rollout = text.rollouts[layer][start] if start < len(text.truth) else Rollout((), ())
    pairs = zip(rollout.guesses[:gamma], text.truth[start:], strict=False)
    return next((n for n, (guess, true) in enumerate(pairs) if guess[0] != true), min(gamma, len(text.truth) - start))


def walk(text: Text, layer: int, gamma: int, tree: Tree = CHAIN) -> Iterator[Round]:
    """Decode a text in rounds; its first token comes from the prompt's pass."""
    start, length = 1, len(text.truth)
    while start < length:
        count = accepted(text, layer, start, gamma)
        tokens = min(count + 1 + gain(text, layer, start, count, gamma, tree), length - start)
        yield Round(start, count, tokens, start + count < length)
        start += tokens


def gain(text: Text, layer: int, start: int, count: int, gamma: int, tree: Tree) -> int:
    """Tokens a tree adds to a round: those after a further guess that is right where the chain went wrong.

    The right guess itself is no gain: the full depth supplies that token in any case.
    """
    rollout, wrong = text.rollouts[layer][start], start + count
    if count == gamma or wrong >= len(text.truth) or count not in tree.positions(rollout, gamma):
        return 0
    if text.truth[wrong] not in rollout.guesses[count][1 : tree.width]:
        return 0
    return 1 + (accepted(text, layer, wrong + 1, gamma - count - 1) if tree.grown else 0)


def tokens_a_round(texts: Sequence[Text], layer: int, gamma: int, tree: Tree = CHAIN) -> float:
    rounds = [found.tokens for text in texts for found in walk(text, layer, gamma, tree)]
    return sum(rounds) / len(rounds)


def side_depth(texts: Sequence[Text], layer: int, gamma: int, tree: Tree) -> float:
    """Drafts after a further guess, down to the depth of the chain, mean of all rounds; 0 where it does not grow."""
    if not tree.grown:
        return 0.0
    depths = [
        gamma - 1 - tree.positions(text.rollouts[layer][found.start], gamma)[0]
        for text in texts
        for found in walk(text, layer, gamma, tree)
    ]
    return sum(depths) / len(depths)


def recall(texts: Sequence[Text], layer: int, kappa: int) -> float:
    """How often the true token is among an exit's best `kappa` guesses, over all new tokens."""
    ranks = [rank for text in texts for rank in text.ranks[layer]]
    return sum(rank < kappa for rank in ranks) / len(ranks)


def hits(text: Text, draft_exit: int, guess_exit: int, gamma: int, kappa: int) -> list[bool]:
    """For every whole round: was the accepted prefix with its correction among the branches drafted ahead?

    Branches start from the best `kappa` guesses of `guess_exit` after every prefix of the drafts, so the one that
    counts is there if the correction is among the guesses after the accepted drafts.
    """
    rounds = (found for found in walk(text, draft_exit, gamma) if found.whole)
    return [text.ranks[guess_exit][found.start + found.accepted] < kappa for found in rounds]


def hit_rate(texts: Sequence[Text], draft_exit: int, guess_exit: int, gamma: int, kappa: int) -> float:
    found = [hit for text in texts for hit in hits(text, draft_exit, guess_exit, gamma, kappa)]
    return sum(found) / len(found) if found else 0.0


def num_branches(kappa: int, gamma: int, same_exit: bool) -> int:
    """Rollouts a round: an exit that guesses for its own drafts guesses the draft first, which needs no branch."""
    return kappa * (gamma + 1) - (gamma if same_exit else 0)


@dataclass(frozen=True)
class MirrorCosts:
    """Seconds of the parts of a step for one choice of exits, guesses and drafts.

    Attributes:
        head: target: blocks up to the guessing exit that the drafts have not run, and its guesses.
        rest: target: the blocks after it and the tail.
        branches: draft worker: all rollouts.
        redraft: draft worker: one rollout.
    """

    head: float
    rest: float
    branches: float
    redraft: float

    def step(self, hit: float) -> float:
        """`T_head + max(T_rest, T_branches) + miss * T_redraft`."""
        return self.head + max(self.rest, self.branches) + (1 - hit) * self.redraft


def rollout_seconds(early: float, head: float, gamma: int) -> float:
    """Of `gamma` drafts; the last one is run through the early blocks as well, for its verification."""
    return (gamma + 1) * early + gamma * head


@dataclass(frozen=True)
class TreeCosts:
    """Seconds of a round's parts with more positions than a chain has.

    Attributes:
        chain: those of the chain.
        early_more: a further position in an early step.
        head_more: a further position in an exit's head.
        verified: positions -> measured time of their verification, to which the chain's line was fitted.
    """

    chain: RoundCosts
    early_more: float
    head_more: float
    verified: dict[int, float] = field(default_factory=dict)

    def round(self, gamma: int, tree: Tree, depth: float = 0.0) -> float:
        """Of one round; masks for the tree are taken to cost nothing.

        Guesses without drafts of their own go along with the last early step. Beside the first draft they grow in
        step with the chain; beside the least confident one they must wait until the chain is there.

        Args:
            gamma: drafts of the chain.
            tree: what stands beside it.
            depth: see :func:`side_depth`.
        """
        side = tree.width - 1
        if tree.kind == "none" or side == 0:
            return self.chain.round(gamma)
        if not tree.grown:
            nodes = side * (gamma if tree.kind == "every" else 1)
            return self.chain.round(gamma) + nodes * (self.early_more + self.chain.verify_more)
        extra = side * (1 + depth) * self.chain.verify_more + side * self.early_more
        step = side * (self.early_more + self.head_more)
        if tree.kind == "unsure":
            step = self.chain.early + self.chain.head + (side - 1) * (self.early_more + self.head_more)
        return self.chain.round(gamma) + extra + depth * step

    def speedup(self, texts: Sequence[Text], layer: int, gamma: int, tree: Tree) -> float:
        """Over the full depth."""
        tokens = tokens_a_round(texts, layer, gamma, tree)
        return tokens * self.chain.full / self.round(gamma, tree, side_depth(texts, layer, gamma, tree))


def second_chances(texts: Sequence[Text], layer: int, gamma: int) -> dict[str, float]:
    """Of rounds with a wrong draft: where it stands, and whether the exit's next guesses there are right."""
    wrong = [
        (text.rollouts[layer][found.start], found.accepted, text.truth[found.start + found.accepted])
        for text in texts
        for found in walk(text, layer, gamma)
        if found.whole and found.accepted < gamma
    ]
    count = max(len(wrong), 1)
    rounds = sum(found.whole for text in texts for found in walk(text, layer, gamma))
    unsure = Tree("unsure")
    return {
        "rounds_with_a_wrong_draft": len(wrong) / max(rounds, 1),
        "second_guess_right": sum(true in roll.guesses[n][1:2] for roll, n, true in wrong) / count,
        "third_guess_right": sum(true in roll.guesses[n][2:3] for roll, n, true in wrong) / count,
        "wrong_at_first": sum(n == 0 for _, n, _ in wrong) / count,
        "wrong_at_least_confident": sum((n,) == unsure.positions(roll, gamma) for roll, n, _ in wrong) / count,
    }


def between(points: dict[int, float], place: float) -> float:
    """Straight lines between measured points, the last of them prolonged."""
    places = sorted(points)
    if len(places) == 1:
        return points[places[0]]
    right = min(max(bisect_left(places, place), 1), len(places) - 1)
    low, high = places[right - 1], places[right]
    return points[low] + (points[high] - points[low]) * (place - low) / (high - low)
