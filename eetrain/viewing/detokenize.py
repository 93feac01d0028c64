"""The text each token adds, so that the pieces joined are the decoded whole.

A token alone does not decode to its part of the text: byte-level vocabularies split a character over tokens, and
sentencepiece drops the space in front of the first token it sees. So a short window of ids is decoded with and
without the newest tokens, and the difference is what they add; while the window ends inside a character nothing is
given out, and the character belongs to the token that completes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decoded_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ``ids`` without special tokens, exactly as the vocabulary spells it."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Detokenizer:
    """Text from tokens as they arrive.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._shown = 0

    def put(self, token: int) -> str:
        """The text that can be shown now that ``token`` is there; empty inside a character."""
        self._ids.append(token)
        before, now = self._window()
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def end(self) -> str:
        """What is left: a character that was never completed, shown as the decoder shows it."""
        before, now = self._window()
        self._start = self._shown = len(self._ids)
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        shown = decoded_text(self._tokenizer, self._ids[self._start : self._shown])
        return shown, decoded_text(self._tokenizer, self._ids[self._start :])


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token; joined they are ``decoded_text(tokenizer, ids)``.

    Args:
        tokenizer: a transformers tokenizer.
        ids: of one generated text, without its prompt.

    Returns:
        One text a token; empty for special tokens and inside a character.
    """
    if not ids:
        return []
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.put(token) for token in ids]
    texts[-1] += detokenizer.end()
    return _reconciled(texts, decoded_text(tokenizer, ids))


def _reconciled(texts: list[str], whole: str) -> list[str]:
    """Let the last piece end where the whole ends.

    A decoder with byte fallback turns a whole run of bytes into replacement characters when its last bytes are no
    character, the good ones at its start included; pieces that were given out before do not know that.
    """
    if "".join(texts) == whole:
        return texts
    kept: list[str] = []
    position = 0
    for text in texts[:-1]:
        if not whole.startswith(text, position):
            break
        kept.append(text)
        position += len(text)
    return [*kept, whole[position:], *[""] * (len(texts) - len(kept) - 1)]
