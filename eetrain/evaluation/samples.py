"""What is evaluated on: prompts with their references."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eetrain.data import Row, Template, Text, read_rows
from eetrain.data.tokenization import Example, TextEncoder
from eetrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        prompt_ids: what the model is given.
        references: texts it should generate; none when plain text is continued.
        examples: prompt and reference tokenised as in training, one a reference, scored on the reference.
    """

    prompt_ids: tuple[int, ...]
    references: tuple[str, ...]
    examples: tuple[Example, ...]


def read_samples(
    sources: str | Sequence[str],
    template: Template,
    encoder: TextEncoder,
    *,
    limit: int | None = None,
    prompt_tokens: int | None = None,
    continuation: int = 64,
    max_length: int | None = None,
) -> list[Sample]:
    """Read prompts; rows with an equal prompt become one sample, their responses its references.

    Args:
        sources: as for the data module; hub data sets give their validation split.
        template: how a row becomes prompt and response.
        encoder: the model's.
        limit: use at most this many prompts.
        prompt_tokens: for plain text: the prompt is the first so many tokens of each document, and what follows is
            scored by its likelihood only. Shorter documents are left out.
        continuation: for plain text: score at most so many tokens after the prompt.
        max_length: most tokens of prompt and reference; what is longer is cut.

    Raises:
        ConfigError: `prompt_tokens` is missing for plain text, given for another template, or below 1.
        DataError: a source cannot be read, or no document is long enough.
    """
    plain = isinstance(template, Text)
    _check(plain, template, prompt_tokens)
    rows = read_rows(sources, default_split="validation")
    if plain:
        assert prompt_tokens is not None
        samples = _continuations(rows, template, encoder, prompt_tokens, continuation)
    else:
        samples = _prompts(rows, template, encoder, max_length)
    if not samples:
        raise DataError(
            f"No document of {sources} has more than {prompt_tokens} tokens.", hint="Lower --prompt_tokens."
        )
    return samples[:limit]


def _check(plain: bool, template: Template, prompt_tokens: int | None) -> None:
    if plain and prompt_tokens is None:
        raise ConfigError(
            "The template is plain text, which has no prompts.",
            hint="Set --prompt '{field}' and --response '{field}' for rows with both, or --prompt_tokens N to continue "
            "the first N tokens of each document.",
        )
    if not plain and prompt_tokens is not None:
        raise ConfigError(
            f"prompt_tokens={prompt_tokens}, but the template {type(template).__name__} has prompts of its own.",
            hint="Leave out --prompt_tokens, or --prompt, --response and --template.",
        )
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ConfigError(f"prompt_tokens={prompt_tokens}, must be at least 1.", hint="For example 32.")


def _prompts(rows: Iterable[Row], template: Template, encoder: TextEncoder, max_length: int | None) -> list[Sample]:
    all_rows = list(rows)
    groups: dict[tuple[int, ...], list[tuple[str, Example]]] = {}
    for row, example in zip(all_rows, template.encode(all_rows, encoder), strict=True):
        prompt = tuple(template.prompt_ids(row, encoder))
        # The prompt is never scored here, whatever the template does in training.
        scored = [flag and place >= len(prompt) for place, flag in enumerate(example.scored)]
        cut = Example(example.ids[:max_length], scored[:max_length], example.origin)
        groups.setdefault(prompt, []).append((template.response_text(row), cut))
    return [
        Sample(prompt, tuple(text for text, _ in pairs if text), tuple(example for _, example in pairs))
        for prompt, pairs in groups.items()
    ]


def _continuations(
    rows: Iterable[Row], template: Template, encoder: TextEncoder, prompt_tokens: int, continuation: int
) -> list[Sample]:
    samples = []
    for example in template.encode(list(rows), encoder):
        if len(example.ids) > prompt_tokens:
            ids = example.ids[: prompt_tokens + continuation]
            scored = [place >= prompt_tokens for place in range(len(ids))]
            samples.append(Sample(tuple(ids[:prompt_tokens]), (), (Example(ids, scored, example.origin),)))
    return samples
