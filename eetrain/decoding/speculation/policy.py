"""Self-speculation as a policy: early exits draft, the remaining blocks verify, and nothing is lost.

Source: LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710, section on self-speculative decoding), here for any exit and
head, batches, and several exits in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from eetrain.decoding.policy import Decodable, Policy, check_full_depth, listed
from eetrain.decoding.speculation.stopping import DraftStop, build_stop, check_stop
from eetrain.decoding.speculation.tuning import DraftTuner
from eetrain.errors import ConfigError
from eetrain.shorthand import integers, spell

AUTO = "auto"
Exits = tuple[int, ...] | str


@dataclass(frozen=True)
class Speculation:
    """What drafting and verifying came to.

    Attributes:
        rounds: passes of the batch through the verifying blocks.
        row_rounds: the same counted by row.
        drafted: tokens that were verified.
        judged: those among them that verification got to: what stood, and the first that fell.
        accepted: what stood.
    """

    rounds: int = 0
    row_rounds: int = 0
    drafted: int = 0
    judged: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the judged drafts that stood; NaN if none was judged."""
        return self.accepted / self.judged if self.judged else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """Tokens a row gains in one round: what stood, and one from the full depth."""
        return 1 + self.accepted / self.row_rounds if self.row_rounds else float("nan")

    def __add__(self, other: Speculation) -> Speculation:
        return Speculation(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))


class Memory:
    """What decoding has learned of a model under a policy, over all calls.

    Args:
        stop: of the policy.
        draft: longest draft.
    """

    def __init__(self, stop: float | str | None, draft: int) -> None:
        self.stop: DraftStop = build_stop(stop)
        self.tuner = DraftTuner(draft)


@dataclass(frozen=True)
class Speculative(Policy):
    """Draft with the first blocks and an exit, verify with the blocks behind it; output is that of the full depth.

    With several exits the draft of one is verified by the next, and only what stands there goes on to the full depth.

    Args:
        exit: exits, shallowest first; ``auto`` chooses one and the draft's length anew in every round, by measured
            times and acceptance.
        draft: how many tokens are drafted before the next exit, or the full depth, verifies them: one number for all
            exits, or one for each. With ``exit=auto`` the longest.
        stop: end a draft early: where the exit is not surer than this number, or by the rule ``thompson`` or
            ``calibrated``; see :mod:`eetrain.decoding.speculation.stopping`.
    """

    exit: Exits = AUTO
    draft: tuple[int, ...] = (4,)
    stop: float | str | None = None
    lossless = True

    def __post_init__(self) -> None:
        check_stop(self.stop)
        if not all(length >= 1 for length in self.draft):
            raise ConfigError(
                f"draft={'+'.join(map(str, self.draft))}, must be at least 1.", hint="Use never to draft nothing."
            )
        if not isinstance(self.exit, str) and sorted(set(self.exit)) != list(self.exit):
            raise ConfigError(
                f"exit={'+'.join(map(str, self.exit))}: a draft goes from shallow exits to deeper ones.",
                hint="For example exit=3 or exit=3+6.",
            )
        if len(self.draft) not in (1, 1 if self.exit == AUTO else len(self.exit)):
            raise ConfigError(
                f"Exit policy {self} has {len(self.draft)} draft lengths.",
                hint="Give one for all exits, or one for each.",
            )

    def lengths(self, exits: tuple[int, ...]) -> tuple[int, ...]:
        """The draft length of each exit."""
        return self.draft * len(exits) if len(self.draft) == 1 else self.draft

    def candidates(self, model: Decodable) -> tuple[int, ...]:
        """Exits that ``auto`` chooses among."""
        return tuple(layer for layer in model.exit_layers if layer < model.num_blocks)

    def check(self, model: Decodable) -> None:
        """See :meth:`Policy.check`."""
        check_full_depth(self, model)
        exits = self.candidates(model) if isinstance(self.exit, str) else self.exit
        missing = [layer for layer in exits if layer not in model.exit_layers]
        if missing or not exits:
            found = f"no exit after block {missing[0]}" if missing else "no exit below its last block"
            raise ConfigError(
                f"Exit policy {self}: the model has {found}.",
                hint=f"Exits stand after blocks {listed(model.exit_layers)}.",
            )
        if model.config.head == "block" and len(exits) > 1:
            raise ConfigError(
                f"Exit policy {self} uses several exits, but block heads need keys and values of every token at each.",
                hint="Name one exit, or use other heads.",
            )

    def __str__(self) -> str:
        return spell("speculative", self, None)


_MEMORIES: WeakKeyDictionary[Any, dict[Speculative, Memory]] = WeakKeyDictionary()


def memory_of(model: Any, policy: Speculative) -> Memory:
    """What decoding ``model`` under ``policy`` has learned so far; forgotten with the model."""
    memories = _MEMORIES.setdefault(model, {})
    if policy not in memories:
        memories[policy] = Memory(policy.stop, policy.draft[0])
    return memories[policy]


def parse_exits(text: str) -> Exits:
    """Read ``3``, ``3+6`` or ``auto``.

    Raises:
        ValueError: it is none of them.
    """
    return AUTO if text == AUTO else integers(text)
