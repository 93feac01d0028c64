"""What the argument parser says, in words for the user: one line, and the closest key where one is unknown."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

_UNKNOWN = (
    re.compile(r"unrecognized arguments: --?(?P<key>[^\s=]+)"),
    re.compile(r"does not accept (?:nested key|option) '(?P<key>[^']+)'"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"[Kk]ey '(?P<key>[^']+)' is not expected"),
)
_CLASS = re.compile(r"given class_path '(?P<path>[^']+)'")
_PARSER_KEY = re.compile(r"""^Parser key ["'](?P<key>[^"']+)["']:\s*""")
_UNION = "Does not validate against any of the Union subtypes"


def is_argument_problem(error: BaseException) -> bool:
    """Whether ``error`` is a value the parser refused while it built an object."""
    return isinstance(error, ValueError) and (_UNION in str(error) or _CLASS.search(str(error)) is not None)


def explain(text: str, verb: str, known: Iterable[str]) -> tuple[str, str]:
    """Message and hint for what the parser said.

    Args:
        text: the parser's message, often of many lines.
        verb: which verb was called.
        known: the keys this verb knows.
    """
    for pattern in _UNKNOWN:
        found = pattern.search(text)
        if found:
            return _unknown_key(found["key"].removeprefix(f"{verb}."), text, verb, known)
    if "import path" in text or "Unable to import" in text:
        hint = "Write a class as its name or as a dotted path, such as eetrain.objectives.EETuning."
    else:
        hint = f"`eetrain {verb} --help` lists the settings and their types."
    message, _, own_hint = one_line(text).partition(" HINT: ")
    return message, own_hint or hint


def one_line(text: str) -> str:
    """The parser's message without its lists of types: what was set, and the errors that matter."""
    key = _PARSER_KEY.match(text)
    body = text[key.end() :] if key else text
    if _UNION in body:
        lines = [line.strip(" -") for line in body.split("Errors:")[-1].split("Given value")[0].splitlines()]
        reasons = [line for line in lines if line and "NoneType" not in line]
        own = [reason for reason in reasons if "HINT:" in reason]
        reasons = own or reasons  # an error of ours says it all; the other forms of the value were not meant
        value = re.search(r"Given value: (.*)", body)
        got = f" Got value: {value[1]}" if value and not own else ""
        got = "" if "Namespace(" in got else got
        body = " ".join(reasons) + got
    body = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", body)
    body = re.sub(r"typing\.Literal\[(.*?)\]", r"value out of \1", body)
    body = re.sub(r"\s+", " ", body).strip(" -")
    return f"{key['key']}: {body}" if key else body


def _unknown_key(key: str, text: str, verb: str, known: Iterable[str]) -> tuple[str, str]:
    where, names = "", list(known)
    if key in names:
        return f"{key!r} is given by its place, not as --{key}.", f"Write: eetrain {verb} {key.upper()} ..."
    owner = _CLASS.search(text)
    if owner:
        where, names = f" of {owner['path']}", _parameters(owner["path"])
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if not close:
        tails = {name.rpartition(".")[2]: name for name in names}
        close = [tails[tail] for tail in difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.7)]
    hint = f"Did you mean {close[0]}?" if close else f"`eetrain {verb} --help` lists the settings."
    return f"there is no setting {key!r}{where}.", hint


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
