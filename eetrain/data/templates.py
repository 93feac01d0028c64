"""How a row becomes tokens and which of them are scored.

Every template tokenises prompt and response apart and joins the ids. Tokenising them as one text could merge
characters across the boundary into a token that the model never sees when it continues a prompt.
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Sequence

from eetrain.data.sources import Row
from eetrain.data.tokenization import Example, TextEncoder
from eetrain.errors import ConfigError


class Template(ABC):
    """Base of the templates; name a class by ``class_path`` in YAML, your own included."""

    splittable: bool = False
    """Whether a document longer than a row may go on in the next one (all its tokens are alike)."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], encoder: TextEncoder) -> list[Example]:
        """Tokenise rows for training and evaluation, one example a row."""

    @abstractmethod
    def prompt_ids(self, row: Row, encoder: TextEncoder) -> list[int]:
        """Tokenise what the model is given before it generates; exactly the start of `encode`'s ids."""

    @abstractmethod
    def response_text(self, row: Row) -> str:
        """Return the text the model should generate; empty where the row holds none."""


class PromptResponse(Template):
    """A prompt and its response: ``bos + prompt + response + eos``, scored on response and eos.

    Example:
        >>> template = PromptResponse(prompt="{mr}\\n=> ", response="{ref}")
        >>> template.response_text(Row({"mr": "name[Aroma]", "ref": "Aroma."}, "a.csv:2"))
        'Aroma.'

    Args:
        prompt: text with ``{field}`` for fields of the row; write ``{{`` for a brace.
        response: likewise.
        bos: what to start with, see `TextEncoder.start_ids`.
        eos: whether the response ends with the tokenizer's eos token, if it has one.
        train_on_prompt: score the prompt too.
    """

    def __init__(
        self,
        prompt: str,
        response: str,
        bos: bool | None = None,
        eos: bool = True,
        train_on_prompt: bool = False,
    ) -> None:
        self.prompt, self.response = FieldText(prompt, "prompt"), FieldText(response, "response")
        self.bos, self.eos, self.train_on_prompt = bos, eos, train_on_prompt
        if not self.response.fields:
            raise ConfigError(
                f"The template's response {response!r} reads no field of the rows.",
                hint="Write fields as '{name}'.",
            )

    def encode(self, rows: Sequence[Row], encoder: TextEncoder) -> list[Example]:
        """Tokenise rows, prompts and responses in one batch each."""
        start = encoder.start_ids(self.bos)
        end = encoder.eos_ids if self.eos else []
        prompts = encoder.encode([self.prompt.fill(row) for row in rows])
        responses = encoder.encode([self.response.fill(row) for row in rows])
        return [
            _example(start + prompt, response + end, row, self.train_on_prompt)
            for row, prompt, response in zip(rows, prompts, responses, strict=True)
        ]

    def prompt_ids(self, row: Row, encoder: TextEncoder) -> list[int]:
        """Return ``bos + prompt``."""
        return encoder.start_ids(self.bos) + encoder.encode([self.prompt.fill(row)])[0]

    def response_text(self, row: Row) -> str:
        """Return the filled response, without eos."""
        return self.response.fill(row)


class Text(Template):
    """Plain documents: ``bos + text + eos``, all scored.

    Args:
        field: the field that holds the document; files of plain text give ``text``.
        bos: what to start with, see `TextEncoder.start_ids`.
        eos: whether the document ends with the tokenizer's eos token, if it has one.
    """

    splittable = True

    def __init__(self, field: str = "text", bos: bool | None = None, eos: bool = True) -> None:
        self.field, self.bos, self.eos = field, bos, eos

    def encode(self, rows: Sequence[Row], encoder: TextEncoder) -> list[Example]:
        """Tokenise documents."""
        start = encoder.start_ids(self.bos)
        end = encoder.eos_ids if self.eos else []
        documents = encoder.encode([row.text(self.field) for row in rows])
        return [_example(start, ids + end, row, False) for row, ids in zip(rows, documents, strict=True)]

    def prompt_ids(self, row: Row, encoder: TextEncoder) -> list[int]:
        """Return ``bos + text``: the document is what is continued."""
        return encoder.start_ids(self.bos) + encoder.encode([row.text(self.field)])[0]

    def response_text(self, row: Row) -> str:
        """Return the empty text: a document has no given continuation."""
        return ""


class FieldText:
    """A text with ``{field}`` places, filled from rows.

    Unlike `str.format` it takes names literally (spaces and dots included) and offers no attributes, indices
    or formats.

    Args:
        text: the text.
        setting: what to call it in errors.
    """

    def __init__(self, text: str, setting: str) -> None:
        try:
            self.parts = [(literal, field) for literal, field, _, _ in _parse(text)]
        except ValueError as error:
            raise ConfigError(
                f"The template's {setting} {text!r} cannot be read: {error}.",
                hint="Write fields as '{name}' and a brace of the text as '{{' or '}}'.",
            ) from error
        self.fields = [field for _, field in self.parts if field is not None]

    def fill(self, row: Row) -> str:
        """Return the text with the fields of `row`.

        Raises:
            DataError: a field is missing or of another type than string, number or list of strings.
        """
        return "".join(literal + ("" if field is None else row.text(field)) for literal, field in self.parts)


def _parse(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    parts = list(string.Formatter().parse(text))
    for _, field, form, conversion in parts:
        if field == "":
            raise ValueError("a place has no name")
        if form or conversion:
            raise ValueError(f"{{{field}}} carries a format")
    return parts


def _example(prompt: list[int], response: list[int], row: Row, train_on_prompt: bool) -> Example:
    scored = [train_on_prompt] * len(prompt) + [True] * len(response)
    scored[:1] = [False] * len(scored[:1])
    return Example(prompt + response, scored, row.origin)
