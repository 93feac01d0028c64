"""A generated text as tokens with their depths, ready to be shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eetrain.viewing.detokenize import token_texts


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        text: what it adds to the text; empty for special tokens and inside a character.
        id: in the vocabulary.
        depth: blocks it ran.
        drafted_by: under speculation, the exit that drafted it; 0 if none did.
    """

    text: str
    id: int
    depth: int
    drafted_by: int = 0

    @property
    def chosen_after(self) -> int:
        """The block whose output chose the token first: with speculation the exit that drafted it."""
        return self.drafted_by or self.depth


@dataclass(frozen=True)
class Generation:
    """A prompt and what the model made of it."""

    prompt: str
    tokens: tuple[Token, ...]

    @classmethod
    def read(
        cls,
        tokenizer: Any,
        prompt: str,
        ids: Sequence[int],
        depths: Sequence[int],
        drafted_by: Sequence[int] | None = None,
    ) -> Generation:
        """From the new ids and depths of one row; depth 0 marks what follows the row's end.

        Args:
            tokenizer: a transformers tokenizer.
            prompt: as text.
            ids: generated ids, padding included.
            depths: one row of ``exit_trace``.
            drafted_by: one row of ``draft_trace``, if there is one.
        """
        drafts = [0] * len(ids) if drafted_by is None else drafted_by
        kept = [entry for entry in zip(ids, depths, drafts, strict=True) if entry[1] > 0]
        texts = token_texts(tokenizer, [token for token, _, _ in kept])
        return cls(prompt, tuple(Token(text, *entry) for text, entry in zip(texts, kept, strict=True)))

    @property
    def text(self) -> str:
        """The generated text."""
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True)
class DepthShare:
    """How many tokens were chosen after block ``depth``, and their share of all tokens."""

    depth: int
    tokens: int
    share: float


def depth_shares(tokens: Sequence[Token]) -> list[DepthShare]:
    """Shares of the depths that occur, shallow to deep; they sum to 1."""
    counts = Counter(token.chosen_after for token in tokens)
    return [DepthShare(depth, count, count / len(tokens)) for depth, count in sorted(counts.items())]


def speculated(tokens: Sequence[Token]) -> bool:
    """Whether some were drafted: then all have run all blocks, and what differs is who chose them."""
    return any(token.drafted_by for token in tokens)


def mean_depth(tokens: Sequence[Token]) -> float | None:
    """Blocks per token on average; ``None`` without tokens."""
    return sum(token.depth for token in tokens) / len(tokens) if tokens else None
