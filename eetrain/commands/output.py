"""Where commands write: results to stdout, progress to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 240


def print_json(data: Any) -> None:
    """Write one JSON object and nothing else."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")


def stdout(color: str = "auto") -> Console:
    """The console for results.

    Args:
        color: ``always``, ``never``, or ``auto``: on a terminal unless the environment sets ``NO_COLOR``.
    """
    if color == "always":
        return Console(force_terminal=True, color_system="truecolor", no_color=False, highlight=False)
    terminal = sys.stdout.isatty()
    colours = terminal and color == "auto" and not os.environ.get("NO_COLOR")
    return Console(no_color=not colours, highlight=False, width=None if terminal else _PIPE_WIDTH)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1) -> None:
    """Write a table: with lines on a terminal, as aligned columns in a pipe.

    Args:
        title: above it.
        columns: their names.
        rows: values; floats are rounded, ``None`` is shown as a dash.
        left: how many columns stand on the left side; the others are numbers.
    """
    console = stdout()
    style: dict[str, Any] = {} if console.is_terminal else {"box": None, "pad_edge": False}
    table = Table(title=Text(title), title_justify="left", **style)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(value)) for value in row))
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write("\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def progress(enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Give ``on_step(what, done, total)``, which draws a bar on stderr that is gone at the end; none in a pipe."""
    hidden = not enabled or not sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bars:
        tasks: dict[str, Any] = {}

        def on_step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield on_step
