"""Prompts of a file, for the commands that continue them."""

from __future__ import annotations

from eetrain.commands.opening import unescaped
from eetrain.data import read_rows
from eetrain.data.sources import local_files
from eetrain.data.templates import FieldText
from eetrain.errors import ConfigError, DataError

_RECORDS = (".csv", ".json", ".jsonl", ".parquet")


def read_prompts(file: str, template: str | None = None, limit: int | None = None) -> list[str]:
    r"""Prompts of a file: one a line, or one a record.

    Args:
        file: text, or records as .csv, .json, .jsonl or .parquet; a glob pattern names several of these.
        template: of records: text with ``{field}``, where ``\n``, ``\t`` and ``\\`` stand for newline, tab and
            backslash; the field ``prompt`` if left out.
        limit: take at most so many.

    Raises:
        DataError: the file is missing, unreadable or empty, or a record lacks a field.
        ConfigError: a template for a file that has no fields, or one that cannot be read.
    """
    path = local_files(file)[0]
    if path.name.removesuffix(".gz").endswith(_RECORDS):
        text = FieldText("{prompt}" if template is None else unescaped(template), "prompt")
        return [text.fill(row) for row in read_rows(file, limit=limit)]
    if template is not None:
        raise ConfigError(
            f"template={template!r} fills in fields, and {path} has none.",
            hint="Leave --template out, or give a .csv, .json, .jsonl or .parquet file.",
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint="Give a UTF-8 text file.") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompt.", hint="Write one prompt a line.")
    return prompts[:limit]
