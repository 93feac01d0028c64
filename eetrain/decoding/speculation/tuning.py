"""Which exit drafts, and how long: chosen while decoding, from measured times and acceptance.

With a share ``a`` of judged drafts standing, ``t_d`` seconds a drafted token and ``t_v`` seconds to verify, a round of
``g`` drafts gives ``(1 - a^(g + 1)) / (1 - a)`` tokens in ``g t_d + t_v`` seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_TRIALS = 3
_REVISIT = 32
_MEMORY = 0.97


@dataclass
class _Seen:
    """Running means of one exit, older rounds weighing less."""

    rounds: int = 0
    judged: float = 0.0
    accepted: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def rate(self, length: int) -> float:
        """Expected tokens a second of a row, with drafts of ``length`` tokens."""
        return expected_tokens(self.acceptance, length) / (length * self.draft_seconds + self.verify_seconds)

    @property
    def acceptance(self) -> float:
        """Share of judged drafts that stood, pulled a little towards one half."""
        return (self.accepted + 1) / (self.judged + 2)


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens a row gains from a draft of ``length`` tokens, each of which stands with probability ``acceptance``."""
    return sum(acceptance**place for place in range(length + 1))


class DraftTuner:
    """Tries every exit, then keeps to the best, and looks at another now and then.

    Args:
        longest: draft.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._seen: dict[int, _Seen] = {}
        self._rounds = 0

    def choose(self, exits: Sequence[int]) -> tuple[int, int]:
        """The exit and the draft length of the next round."""
        for layer in exits:
            self._seen.setdefault(layer, _Seen())
        self._rounds += 1
        fewest = min(exits, key=lambda layer: self._seen[layer].rounds)
        if self._seen[fewest].rounds < _TRIALS or self._rounds % _REVISIT == 0:
            return fewest, self._best_length(fewest)
        best = max(exits, key=lambda layer: self._seen[layer].rate(self._best_length(layer)))
        return best, self._best_length(best)

    def observe(self, layer: int, drafted: int, seconds: tuple[float, float], judged: int, accepted: int) -> None:
        """Learn from a round.

        Args:
            layer: the exit.
            drafted: tokens of the longest row.
            seconds: spent drafting, and verifying.
            judged: drafts of all rows that verification got to.
            accepted: those that stood.
        """
        seen = self._seen[layer]
        seen.rounds += 1
        seen.judged = _MEMORY * seen.judged + judged
        seen.accepted = _MEMORY * seen.accepted + accepted
        share = max(1 - _MEMORY, 1 / seen.rounds)
        if drafted:
            seen.draft_seconds += share * (seconds[0] / drafted - seen.draft_seconds)
        seen.verify_seconds += share * (seconds[1] - seen.verify_seconds)

    def _best_length(self, layer: int) -> int:
        seen = self._seen[layer]
        if not seen.draft_seconds:
            return max(1, self.longest // 2)
        return max(range(1, self.longest + 1), key=seen.rate)
