"""Rows of text from local files and from the Hugging Face hub, each with the place it came from.

A source is a string:

- a file or a glob pattern (``data/*.csv.gz``; ``**`` goes into sub-folders), read by its ending: ``.csv``,
  ``.json`` (one list of objects), ``.jsonl``, ``.parquet``; any other ending is one document a file, with the
  single field ``text``. All but Parquet may also end in ``.gz``;
- ``hub:owner/name``, ``hub:owner/name@config``, ``hub:owner/name#split`` or both, loaded by
  ``datasets.load_dataset``. Without ``#split`` the split is the one it is read for (``train``, ``validation``
  or ``test``; ``predict`` reads ``test``).
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eetrain.data.formats import read_file
from eetrain.errors import DataError

HUB_PREFIX = "hub:"
_TWO_WAYS = (
    "Give a file or glob pattern such as 'data/train*.jsonl', or a hub data set as 'hub:owner/name@config#split'."
)


@dataclass(frozen=True)
class Row:
    """One record of a data set.

    Args:
        fields: column name -> value, as the file gave it.
        origin: ``file:line``, the 1-based physical line where the record starts (for Parquet and the hub: its
            number).
    """

    fields: Mapping[str, Any]
    origin: str

    def value(self, name: str) -> Any:
        """Return the value of field `name`.

        Raises:
            DataError: the record has no such field.
        """
        if name not in self.fields:
            raise DataError(
                f"{self.origin}: there is no field {name!r}; the row has "
                f"{', '.join(map(repr, self.fields)) or 'none'}.",
                hint="Name one of these fields in the template, or correct the row.",
            )
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return field `name` as text: a number is written out, the strings of a list are joined by one
        space.

        Raises:
            DataError: the field is missing or of another type.
        """
        value = self.value(name)
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return " ".join(value)
        raise DataError(
            f"{self.origin}: field {name!r} is {_describe(value)}, not a string, a number or a list of strings.",
            hint="Correct the row, or use a template that reads other fields.",
        )


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub, written ``hub:path@config#split``."""

    path: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """Take ``hub:path@config#split`` apart; `config` and `split` may be left out."""
        rest, _, split = source.removeprefix(HUB_PREFIX).partition("#")
        path, _, config = rest.partition("@")
        if not path:
            raise DataError(f"The source {source!r} names no data set.", hint=_TWO_WAYS)
        return cls(path, config or None, split or None)

    def load(self, default_split: str) -> Any:
        """Return the `datasets.Dataset` of `split`, or of `default_split` where the source names none.

        Raises:
            DataError: it cannot be loaded.
        """
        import datasets

        split = self.split or default_split
        try:
            return datasets.load_dataset(self.path, self.config, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"The hub data set {self.path!r} (config {self.config!r}, split {split!r}) could not be "
                f"loaded: {lines[0]}",
                hint="Write the config after '@' and the split after '#'; check the name, the network "
                "and your access token.",
            ) from error

    def rows(self, default_split: str) -> Iterator[Row]:
        """Yield the rows of `load`."""
        for number, fields in enumerate(self.load(default_split), start=1):
            yield Row(fields, f"{HUB_PREFIX}{self.path}#{self.split or default_split}:{number}")


def read_rows(sources: str | Sequence[str], default_split: str = "train", limit: int | None = None) -> Iterator[Row]:
    """Yield the rows of all sources in order, one at a time.

    Args:
        sources: one source or a list of them, see the top of this module.
        default_split: the split of hub sources that name none.
        limit: stop after this many rows.

    Raises:
        DataError: a source is missing, of an unreadable format, empty, or holds a malformed row (named with
            its line).
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    rows = itertools.chain.from_iterable(_rows_of(name, default_split) for name in names)
    count = 0
    for row in itertools.islice(rows, limit):
        count += 1
        yield row
    if count == 0:
        raise DataError(
            f"The data set {', '.join(names) or '[]'} has no rows.", hint="Give a file with at least one row."
        )


def local_files(source: str) -> list[Path]:
    """Return the files that a path or glob pattern names, sorted.

    Raises:
        DataError: there is no such file, or the path is a folder.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(
            f"The data source {source!r} is a folder.",
            hint=f"Name its files by a pattern, such as '{source.rstrip('/')}/*.jsonl'.",
        )
    files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(f"File not found: {source!r}.", hint=_TWO_WAYS)
    return files


def is_hub(source: str) -> bool:
    """Tell whether the source is a hub data set."""
    return source.startswith(HUB_PREFIX)


def _rows_of(source: str, default_split: str) -> Iterator[Row]:
    if is_hub(source):
        yield from HubSource.parse(source).rows(default_split)
        return
    for file in local_files(source):
        for line, fields in read_file(file):
            yield Row(fields, f"{file}:{line}")


def _describe(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
