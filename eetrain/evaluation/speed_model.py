r"""What self-speculative decoding gains, from how often a draft is right and what its parts cost.

One round drafts ``g`` tokens with blocks ``1..E`` and an exit's head, then runs the last draft through blocks ``1..E``
as well (no head), and verifies all ``g + 1`` positions in one pass of blocks ``E+1..L`` and the full depth's tail:

.. math:: T(g) = (g + 1)\,t_{early} + g\,t_{head} + t_{verify}(g + 1)

States and keys of blocks ``1..E`` are shared (LayerSkip, arXiv 2404.16710, section 4.3). If every draft that
verification comes to is right with probability ``a``, whatever was before, a round yields (Leviathan et al.,
arXiv 2211.17192, equation 1)

.. math:: n(g) = 1 + a + \dots + a^g = \frac{1 - a^{g+1}}{1 - a}

tokens. There the verification of ``g + 1`` positions costs as much as one step of the full depth; here it costs what it
costs, which on a machine without idle arithmetic grows with the positions. All times are of one batch, whose rows are
taken to go on for equally many rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RoundCosts:
    """Times of the parts of a round, in any one unit.

    Args:
        early: blocks ``1..E`` on one position, with what surrounds them at each step.
        head: an exit's head on one position, the choice of the token included.
        verify: blocks ``E+1..L`` and the tail on one position, choice of the token included.
        verify_more: what each further position of the same pass adds to that.
        full: one decoding step of the full depth without drafts.

    Raises:
        ValueError: a time that is not positive, or a negative :attr:`verify_more` or ``head``.
    """

    early: float
    head: float
    verify: float
    verify_more: float
    full: float

    def __post_init__(self) -> None:
        for name in ("early", "verify", "full"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}, must be positive.")
        for name in ("head", "verify_more"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}, must not be negative.")

    def verification(self, positions: int) -> float:
        """Time to verify so many positions in one pass."""
        return self.verify + self.verify_more * (positions - 1)

    def round(self, draft: int) -> float:
        """Time of a round with so many drafts."""
        _check(1.0, draft)
        return (draft + 1) * self.early + draft * self.head + self.verification(draft + 1)


def tokens_per_round(acceptance: float, draft: int) -> float:
    """Expected tokens of a round, the one the full depth supplies included.

    Args:
        acceptance: probability in ``[0, 1]`` that a judged draft is right.
        draft: drafts a round, at least 1.

    Raises:
        ValueError: an argument out of range.
    """
    _check(acceptance, draft)
    return _geometric(acceptance, draft + 1)


def judged_per_round(acceptance: float, draft: int) -> float:
    """Expected drafts of a round that verification comes to: the accepted ones and the first that is not.

    Args:
        acceptance: see :func:`tokens_per_round`.
        draft: see :func:`tokens_per_round`.
    """
    _check(acceptance, draft)
    return _geometric(acceptance, draft)


def block_evaluations(exit_layer: int, num_blocks: int, draft: int) -> int:
    """Blocks times positions of a round: ``E (g + 1)`` early ones and ``(L - E)(g + 1)`` to verify.

    Args:
        exit_layer: ``E``.
        num_blocks: ``L``.
        draft: ``g``.
    """
    return exit_layer * (draft + 1) + (num_blocks - exit_layer) * (draft + 1)


def speedup(costs: RoundCosts, draft: int, tokens: float) -> float:
    """How many times faster than the full depth a decoder is that yields so many tokens a round.

    Args:
        costs: see there.
        draft: drafts a round.
        tokens: a round and row, expected (:func:`tokens_per_round`) or measured.
    """
    return tokens * costs.full / costs.round(draft)


def expected_speedup(costs: RoundCosts, acceptance: float, draft: int) -> float:
    """:func:`speedup` with the tokens that this acceptance leads to.

    Args:
        costs: see there.
        acceptance: see :func:`tokens_per_round`.
        draft: see :func:`tokens_per_round`.
    """
    return speedup(costs, draft, tokens_per_round(acceptance, draft))


def best_draft(costs: RoundCosts, acceptance: float, drafts: Sequence[int] = range(1, 33)) -> int:
    """The draft length with the highest expected speed-up, the shortest if several have it.

    Args:
        costs: see there.
        acceptance: see :func:`tokens_per_round`.
        drafts: lengths to choose from.
    """
    return max(sorted(drafts), key=lambda draft: expected_speedup(costs, acceptance, draft))


def _geometric(ratio: float, terms: int) -> float:
    return float(terms) if ratio == 1 else (1 - ratio**terms) / (1 - ratio)


def _check(acceptance: float, draft: int) -> None:
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance={acceptance}, must be between 0 and 1.")
    if draft < 1:
        raise ValueError(f"draft={draft}, must be at least 1.")
