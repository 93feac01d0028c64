"""How rows become prompts and responses, as given to a verb."""

from __future__ import annotations

from typing import Any

from eetrain.commands.opening import unescaped
from eetrain.data import PromptResponse, Template, Text
from eetrain.data.templates import FieldText
from eetrain.errors import ConfigError


def chosen_template(template: Template | None, prompt: str | None, response: str | None) -> Template:
    """The template, or prompt and response as one, or plain text.

    Raises:
        ConfigError: more than one way is used, or half of one.
    """
    if prompt is None and response is None:
        return Text() if template is None else template
    if template is not None:
        raise ConfigError(
            "Both a template and --prompt or --response are set.", hint="Use one way to say what a row becomes."
        )
    if prompt is None or response is None:
        missing = "prompt" if prompt is None else "response"
        raise ConfigError(
            f"--{missing} is missing.", hint="Give both, for example --prompt '{question}\\n' --response '{answer}'."
        )
    return PromptResponse(unescaped(prompt), unescaped(response))


def described(template: Template) -> dict[str, Any]:
    """The template as it stands in YAML."""
    kind = type(template)
    settings: dict[str, Any] = {}
    for name, value in vars(template).items():
        if isinstance(value, FieldText):
            settings[name] = _spelled(value)
        elif value is None or isinstance(value, str | int | float):
            settings[name] = value
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": settings}


def _spelled(text: FieldText) -> str:
    """As it is written in a template."""
    parts = [
        literal.replace("{", "{{").replace("}", "}}") + ("" if field is None else f"{{{field}}}")
        for literal, field in text.parts
    ]
    return "".join(parts)
