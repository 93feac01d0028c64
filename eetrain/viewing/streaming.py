"""Tokens shown while they are generated, each with its depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from eetrain.viewing.detokenize import Detokenizer
from eetrain.viewing.tokens import Token


class DepthStreamer(BaseStreamer):
    """A streamer for one row that learns the depth of each token before the token.

    Args:
        tokenizer: a transformers tokenizer.
        show: called with every token that adds text.
    """

    def __init__(self, tokenizer: Any, show: Callable[[Token], None]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._show = show
        self._depth = 0
        self._prompt_seen = False

    def put_depths(self, depth_B: Tensor) -> None:
        """Called by the decoding loop ahead of :meth:`put`."""
        self._depth = int(depth_B[0])

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token a call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        text = self._detokenizer.put(int(value[0]))
        if text:
            self._show(Token(text, int(value[0]), self._depth))

    def end(self) -> None:
        """Show what is left of a character that was never completed."""
        text = self._detokenizer.end()
        if text:
            self._show(Token(text, -1, self._depth))
