"""What the data room needs of a tokenizer, and the table that holds tokenised documents compactly."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eetrain.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """One tokenised document.

    Args:
        ids: token ids.
        scored: for each token whether the loss asks for it; the first token is never asked for, as nothing
            precedes it.
        origin: ``file:line`` of the row it came from.
    """

    ids: list[int]
    scored: list[bool]
    origin: str


class TextEncoder:
    """Text pieces to ids without any token added by the tokenizer; the templates place bos and eos
    themselves.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the backbone's embedding; larger ids are an error. ``None``: not checked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.pad_id: int = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.check([self.pad_id])

    @property
    def eos_ids(self) -> list[int]:
        """The end of a document; empty for a tokenizer without one."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def start_ids(self, bos: bool | None) -> list[int]:
        """Return what a document starts with.

        Args:
            bos: ``None``: the tokens that the tokenizer puts first by itself, else its bos token if it has
                one; ``True``: the same, but having none is an error; ``False``: nothing.

        Raises:
            ConfigError: `bos` is ``True`` and the tokenizer has no bos token.
        """
        if bos is False:
            return []
        own = list(self.tokenizer("")["input_ids"])
        while own and own[-1] in self.eos_ids and own[-1] != self.tokenizer.bos_token_id:
            own.pop()
        if own:
            return own
        if self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        if bos:
            raise ConfigError(
                "The template has bos: true, but the tokenizer has no bos token.",
                hint="Set bos: null or false.",
            )
        return []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise many texts at once.

        Raises:
            ConfigError: an id lies outside the backbone's embedding.
        """
        # `verbose=False`: documents longer than the model are cut or split later, the warning would mislead.
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            self.check(ids)
        return encoded

    def check(self, ids: Sequence[int]) -> None:
        """Refuse ids that the backbone has no embedding for."""
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            raise ConfigError(
                f"The tokenizer ({len(self.tokenizer)} entries) gives id {max(ids)}, but the backbone "
                "embeds only "
                f"{self.vocab_size} tokens.",
                hint="Use the tokenizer that belongs to the backbone, or resize the backbone's embedding.",
            )


def load_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id; an object passes through.

    Raises:
        ConfigError: there is no tokenizer of that name.
    """
    if not isinstance(tokenizer, str):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"The tokenizer {tokenizer!r} could not be loaded: {reason}",
            hint="Give a folder with tokenizer.json or a hub id; set trust_remote_code: true if the "
            "repository brings code.",
        ) from error


class TokenTable:
    """Documents as flat arrays: 5 bytes a token and 8 a document.

    Attributes:
        ids: all tokens one after the other, int32 [tokens].
        scored: whether the loss asks for the token, bool [tokens].
        offsets: where each document starts, and the end, int64 [documents + 1].
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        ids, scored, offsets = array("i"), bytearray(), array("q", [0])
        for example in examples:
            ids.extend(example.ids)
            scored.extend(example.scored)
            offsets.append(len(ids))
        self.ids = torch.from_numpy(np.array(ids, dtype=np.int32))
        self.scored = torch.from_numpy(np.array(scored, dtype=np.bool_))
        self.offsets = torch.from_numpy(np.array(offsets, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1
