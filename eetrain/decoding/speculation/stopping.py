"""When to stop drafting before the draft is full: rules that look at the draft's confidence, never at its tokens.

A rule that looked at the drawn token would change what is drawn: verification makes tokens follow the full model's
distribution only if the decision to draft on does not depend on them. Confidence is the largest probability of the
draft's distribution.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from eetrain.errors import ConfigError

_SEED = 0
_BINS = 10


class DraftStop(Protocol):
    """Decides, row by row, whether the next token is drafted."""

    asks_confidence: bool

    def keeps(self, confidence: float, place: int) -> bool:
        """Whether to keep a draft and go on.

        Args:
            confidence: of the distribution it was taken from.
            place: how many drafts of this row and round came before.
        """

    def observe(self, confidences: Sequence[float], accepted: int) -> None:
        """Learn from a verification.

        Args:
            confidences: of the drafts of a row.
            accepted: how many of them stood.
        """


class FixedLength:
    """Never before the draft is full."""

    asks_confidence = False

    def keeps(self, confidence: float, place: int) -> bool:
        """Always."""
        return True

    def observe(self, confidences: Sequence[float], accepted: int) -> None:
        """Nothing to learn."""


class ConfidenceStop:
    """Stops at the first token the draft is not surer of than a value; that token is not verified.

    Kangaroo (arXiv 2404.18911) calls it double early exit.

    Args:
        value: in [0, 1].
    """

    asks_confidence = True

    def __init__(self, value: float) -> None:
        self.value = value

    def keeps(self, confidence: float, place: int) -> bool:
        """Above the value."""
        return confidence > self.value

    def observe(self, confidences: Sequence[float], accepted: int) -> None:
        """Nothing to learn."""


class ThompsonStop:
    """Stops with the probability that the next draft falls, drawn from what verification has shown (Beta-TS).

    EESD (arXiv 2406.03853): ``theta ~ Beta(alpha, beta)``, stop with probability ``1 - theta``; ``n`` drafts of ``m``
    accepted add ``n`` to ``alpha`` and, if one fell, 1 to ``beta`` (those behind it were not judged). The first draft
    is always kept. The paper leaves the update open; this is its natural reading.

    Args:
        seed: of the draws, which are this rule's own.
    """

    asks_confidence = False

    def __init__(self, seed: int = _SEED) -> None:
        self.alpha, self.beta = 1.0, 1.0
        self._random = random.Random(seed)

    def keeps(self, confidence: float, place: int) -> bool:
        """The first, then by draw."""
        return place == 0 or self._random.random() < self._random.betavariate(self.alpha, self.beta)

    def observe(self, confidences: Sequence[float], accepted: int) -> None:
        """Add what stood and what fell."""
        self.alpha += accepted
        self.beta += accepted < len(confidences)


class CalibratedStop:
    """Thompson sampling with a posterior for each level of the draft's confidence (Calibration-TS).

    EESD (arXiv 2406.03853) takes the prior from the draft's confidence ``c``: ``Beta(k c, k (1 - c))``. Here what
    verification has shown of drafts as sure as this one, in tenths, is added to it, so that the confidence gets
    calibrated while decoding.

    Args:
        weight: ``k``, in drafts: how much the confidence itself counts.
        seed: of the draws.
    """

    asks_confidence = True

    def __init__(self, weight: float = 8.0, seed: int = _SEED) -> None:
        self.weight = weight
        self.stood, self.fell = [0] * _BINS, [0] * _BINS
        self._random = random.Random(seed)

    def keeps(self, confidence: float, place: int) -> bool:
        """By draw."""
        level, sure = _bin(confidence), min(max(confidence, 1e-3), 1 - 1e-3)
        alpha = self.weight * sure + self.stood[level]
        beta = self.weight * (1 - sure) + self.fell[level]
        return self._random.random() < self._random.betavariate(alpha, beta)

    def observe(self, confidences: Sequence[float], accepted: int) -> None:
        """Count drafts that were judged by how sure they were."""
        for place, confidence in enumerate(confidences[: accepted + 1]):
            (self.stood if place < accepted else self.fell)[_bin(confidence)] += 1


RULES = {"thompson": ThompsonStop, "calibrated": CalibratedStop}


def parse_stop(text: str) -> float | str:
    """Read a value in [0, 1] or the name of a rule.

    Raises:
        ValueError: it is neither.
    """
    if text in RULES:
        return text
    return float(text)


def check_stop(value: float | str | None) -> None:
    """Refuse what is no rule.

    Raises:
        ConfigError: says so.
    """
    if value is None or value in RULES or (isinstance(value, float | int) and 0 <= value <= 1):
        return
    raise ConfigError(
        f"stop={value} is no rule for ending a draft.",
        hint=f"A confidence from 0 to 1, or {', '.join(RULES)}; leave it out for drafts of full length.",
    )


def build_stop(value: float | str | None) -> DraftStop:
    """The rule a setting stands for, before it has learned anything."""
    if value is None:
        return FixedLength()
    if isinstance(value, str):
        rule: DraftStop = RULES[value]()
        return rule
    return ConfidenceStop(value)


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)
