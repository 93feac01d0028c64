"""Objects written as one line: ``name``, ``name:value``, ``name:value,key=value`` or ``name:key=value,key=value``.

The same on the command line, in YAML and in requests. The objects are frozen dataclasses; their fields are the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from eetrain.errors import ConfigError

Reader = Callable[[str], Any]


@dataclass(frozen=True)
class Form:
    """How one kind of object is written.

    Attributes:
        kind: the dataclass.
        value: the field that stands without its name, or ``None``.
        readers: for each field its reader, which raises ValueError for a text it cannot read.
    """

    kind: type[Any]
    value: str | None
    readers: Mapping[str, Reader]


def parse(text: str, forms: Mapping[str, Form], what: str, examples: str) -> Any:
    """The object a line stands for.

    Args:
        text: the line.
        forms: by name.
        what: what to call it in errors.
        examples: shown as a hint.

    Raises:
        ConfigError: an unknown name or key, a key given twice, a missing value, or one that cannot be read.
    """

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"{what} {text!r} does not parse: {why}.", hint=f"For example {examples}.")

    head, *options = (part.strip() for part in text.split(","))
    name, _, value = head.partition(":")
    if name not in forms:
        raise wrong(f"{name!r} is none of {', '.join(forms)}")
    form = forms[name]
    if "=" in value:
        options.insert(0, value)
        value = ""
    given: dict[str, str] = {}
    if value:
        if form.value is None:
            raise wrong(f"{name!r} takes no value")
        given[form.value] = value
    for option in options:
        key, _, value = option.partition("=")
        if key not in form.readers or key in given:
            raise wrong(f"{key!r} is not an option of {name!r}, or stands there twice")
        given[key] = value
    if form.value is not None and form.value not in given:
        raise wrong(f"{name!r} needs a value")
    found = {}
    for key, value in given.items():
        try:
            found[key] = form.readers[key](value)
        except ValueError:
            raise wrong(f"{key}={value!r} is not readable") from None
    return form.kind(**found)


def spell(name: str, thing: Any, value: str | None) -> str:
    """The line that stands for a dataclass: fields that differ from their defaults.

    Args:
        name: of its form.
        thing: the object.
        value: the field that stands without its name.
    """
    parts = [
        f"{field.name}={_shown(getattr(thing, field.name))}"
        for field in fields(thing)
        if field.name != value and getattr(thing, field.name) != field.default
    ]
    if value is not None:
        parts.insert(0, _shown(getattr(thing, value)))
    return f"{name}:{','.join(parts)}" if parts else name


def integers(text: str) -> tuple[int, ...]:
    """Read ``3+6``."""
    return tuple(int(part) for part in text.split("+"))


def numbers(text: str) -> tuple[float, ...]:
    """Read ``0.5`` or ``0.5+0.7``."""
    return tuple(float(part) for part in text.split("+"))


def truth(text: str) -> bool:
    """Read ``true`` or ``false``."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)
