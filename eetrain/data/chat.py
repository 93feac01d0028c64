"""Conversations, written out by the tokenizer's own chat template and scored on the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from eetrain.data.sources import Row
from eetrain.data.templates import Template
from eetrain.data.tokenization import Example, TextEncoder
from eetrain.errors import ConfigError, DataError

Message = dict[str, Any]


class Chat(Template):
    """A list of ``{role, content}`` messages through `tokenizer.apply_chat_template`.

    Which tokens belong to an assistant's turn is found without knowledge of the template: for turn `j` the
    conversation is written out up to the turn (with the generation prompt) and up to its end, and the turn
    lies between the longest common prefixes of these two with the whole. So a template that rewrites earlier
    turns shortens the scored part and never widens it.

    Args:
        field: the field that holds the messages.
    """

    def __init__(self, field: str = "messages") -> None:
        self.field = field

    def encode(self, rows: Sequence[Row], encoder: TextEncoder) -> list[Example]:
        """Tokenise conversations."""
        return [self._encode(row, encoder) for row in rows]

    def prompt_ids(self, row: Row, encoder: TextEncoder) -> list[int]:
        """Return the conversation up to a closing assistant turn, or all of it if another role closes."""
        messages = self._messages(row)
        given = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return _written(given, row, encoder, generation_prompt=True)

    def response_text(self, row: Row) -> str:
        """Return the last message's content if the assistant speaks last, else the empty text."""
        last = self._messages(row)[-1]
        return str(last["content"]) if last["role"] == "assistant" else ""

    def _encode(self, row: Row, encoder: TextEncoder) -> Example:
        messages = self._messages(row)
        ids = _written(messages, row, encoder)
        scored = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                start = _common_prefix(ids, _written(messages[:turn], row, encoder, generation_prompt=True))
                end = _common_prefix(ids, _written(messages[: turn + 1], row, encoder))
                scored[start:end] = [True] * len(scored[start:end])
        scored[:1] = [False] * len(scored[:1])
        return Example(ids, scored, row.origin)

    def _messages(self, row: Row) -> list[Message]:
        messages = row.value(self.field)
        if not isinstance(messages, list | tuple) or not messages or not all(_is_message(item) for item in messages):
            raise DataError(
                f"{row.origin}: field {self.field!r} is not a list of messages.",
                hint='Write it as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].',
            )
        return list(messages)


def _written(messages: list[Message], row: Row, encoder: TextEncoder, generation_prompt: bool = False) -> list[int]:
    """Write messages out as ids; no messages at all give no ids (templates may fail on them)."""
    if not messages:
        return []
    if not encoder.tokenizer.chat_template:
        raise ConfigError(
            "The template Chat needs a tokenizer with a chat template; this one has none.",
            hint="Use the tokenizer of an instruction-tuned model, or the template PromptResponse.",
        )
    try:
        ids: list[int] = encoder.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(
            f"{row.origin}: the tokenizer's chat template refuses the conversation: {error}",
            hint="Check the roles and their order.",
        ) from error
    encoder.check(ids)
    return ids


def _common_prefix(left: list[int], right: list[int]) -> int:
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
