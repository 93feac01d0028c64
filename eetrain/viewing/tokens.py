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
    """

    text: str
    id: int
    depth: int


@dataclass(frozen=True)
class Generation:
    """A prompt and what the model made of it."""

    prompt: str
    tokens: tuple[Token, ...]

    @classmethod
    def read(cls, tokenizer: Any, prompt: str, ids: Sequence[int], depths: Sequence[int]) -> Generation:
        """From the new ids and depths of one row; depth 0 marks what follows the row's end.

        Args:
            tokenizer: a transformers tokenizer.
            prompt: as text.
            ids: generated ids, padding included.
            depths: one row of ``exit_trace``.
        """
        pairs = [(token, depth) for token, depth in zip(ids, depths, strict=True) if depth > 0]
        texts = token_texts(tokenizer, [token for token, _ in pairs])
        tokens = (Token(text, token, depth) for text, (token, depth) in zip(texts, pairs, strict=True))
        return cls(prompt, tuple(tokens))

    @property
    def text(self) -> str:
        """The generated text."""
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True)
class DepthShare:
    """How many tokens ran exactly ``depth`` blocks, and their share of all tokens."""

    depth: int
    tokens: int
    share: float


def depth_shares(tokens: Sequence[Token]) -> list[DepthShare]:
    """Shares of the depths that occur, shallow to deep; they sum to 1."""
    counts = Counter(token.depth for token in tokens)
    return [DepthShare(depth, count, count / len(tokens)) for depth, count in sorted(counts.items())]


def mean_depth(tokens: Sequence[Token]) -> float | None:
    """Blocks per token on average; ``None`` without tokens."""
    return sum(token.depth for token in tokens) / len(tokens) if tokens else None
