"""One line of an examination, and how to look at things that may fail in any way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "note", "error"]
Number = int | float
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the examination.

    Attributes:
        name: what was looked at.
        found: what was found.
        state: ``ok``, ``note`` (a run goes on, but look at it) or ``error`` (no run will go well).
        hint: what to do about it.
        measured: the numbers in ``found``, in bytes and seconds.
    """

    name: str
    found: str
    state: State = "ok"
    hint: str = ""
    measured: Mapping[str, Number] = field(default_factory=dict)


def guarded(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """What ``look`` finds; if it cannot look, a note that says why: an examination does not fail itself."""
    try:
        return look()
    except Exception as error:
        return [Check(name, f"could not be examined: {reason(error)}", "note")]


def reason(error: BaseException) -> str:
    """The system's words, or the first line of what a library says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def size(count: float) -> str:
    """Bytes for people: ``64.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: ``0.2 s``, ``12 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
