"""The file formats.

Each reader yields ``(line, fields)``, where `line` is the 1-based physical line on which the record starts.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from eetrain.errors import DataError

Record = tuple[int, dict[str, Any]]


def read_file(path: Path) -> Iterator[Record]:
    """Yield the records of one file; the format follows from the ending (``.gz`` is looked through).

    Raises:
        DataError: the file or one of its rows cannot be read; the message names file and line.
    """
    stem = path.name.lower().removesuffix(".gz")
    return _READERS.get(Path(stem).suffix, _read_document)(path)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[str]:
    """Yield decoded lines with their line ends; decoding line by line is what lets an error name its line."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: the bytes are not UTF-8 text ({error.reason}).",
            hint="Known formats: CSV, JSON, JSONL (each also .gz), Parquet, and plain UTF-8 text of any other ending.",
        ) from error
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read after line {number}: {error}", hint="Check that the file is whole."
        ) from error


def _read_document(path: Path) -> Iterator[Record]:
    text = "".join(_lines(path))
    if text:
        yield 1, {"text": text}


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno}).",
                hint="A .jsonl file holds one JSON object a line.",
            ) from error
        yield number, _object(value, path, number)


def _read_json(path: Path) -> Iterator[Record]:
    """Decode the items of the list one by one, so that each is known by the line it starts on."""
    text = "".join(_lines(path))
    position = _skip_space(text, 0)
    line, counted = 1, 0
    if not text.startswith("[", position):
        raise DataError(
            f"{path}:{1 + text.count(chr(10), 0, position)}: not a list of objects.",
            hint="A .json file holds one list; name it .jsonl if it has one object a line.",
        )
    try:
        position = _skip_space(text, position + 1)
        while not text.startswith("]", position):
            line, counted = line + text.count("\n", counted, position), position
            value, end = json.JSONDecoder().raw_decode(text, position)
            yield line, _object(value, path, line)
            position = _next_item(text, end)
        if rest := text[position + 1 :].strip():
            raise json.JSONDecodeError(f"the list is followed by {rest[:20]!r}", text, position + 1)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}).",
            hint="Correct the item there, or the comma or bracket around it.",
        ) from error


def _next_item(text: str, end: int) -> int:
    """Return where the next item or the closing bracket stands, given where the last item ended."""
    position = _skip_space(text, end)
    if text.startswith("]", position):
        return position
    if not text.startswith(",", position):
        raise json.JSONDecodeError("expected ',' or ']'", text, position)
    return _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[Record]:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, path, line)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(cells)} columns, but the header has {len(header)} ({', '.join(header)}).",
                    hint="Quote cells that hold a comma or a line break.",
                )
            yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: not valid CSV ({error}).",
            hint='Quote cells with ", double a quote inside a cell; keep very long texts in JSONL.',
        ) from error


def _checked_header(cells: list[str], path: Path, line: int) -> list[str]:
    if len(set(cells)) != len(cells):
        raise DataError(
            f"{path}:{line}: the header names a column twice ({', '.join(cells)}).",
            hint="Rename one of them.",
        )
    return cells


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file: {error}", hint="Check that the file is whole."
        ) from error


def _object(value: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}:{line}: a JSON {type(value).__name__}, not an object.",
            hint='Write each row as {"field": "value", ...}.',
        )
    return value


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
