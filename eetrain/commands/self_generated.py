"""Texts that a model writes, as rows to train its exits on: a file that is there when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from eetrain.commands.decoding import Decoder
from eetrain.errors import ConfigError
from eetrain.viewing import Token, mean_depth


class SelfGenerated:
    """Writes ``{"prompt": ..., "response": ..., "finished": ...}`` lines; ``finished`` tells ended texts from cut ones.

    Rows are gathered in ``FILE.partial``, whose first line says how they were made. A command that was stopped goes on
    there when it is given again with the same settings; the file itself appears at the end, at once.

    Args:
        file: to write, ending in ``.jsonl``.
        settings: all that the texts depend on.

    Raises:
        ConfigError: the file is there, or has another ending.
    """

    def __init__(self, file: str, settings: Mapping[str, Any]) -> None:
        self.file = Path(file)
        self.partial = self.file.with_name(self.file.name + ".partial")
        self._settings = dict(settings)
        if self.file.suffix != ".jsonl":
            raise ConfigError(f"out={file!r} gets one JSON object a line.", hint="Let its name end in .jsonl.")
        if self.file.exists():
            raise ConfigError(f"out={file!r} exists.", hint="Set --out to another path, or delete it.")

    def write(self, decoder: Decoder, prompts: Sequence[str]) -> dict[str, Any]:
        """Continue the prompts that are not done yet; says how many there are in all, and how fast the last ones went.

        Raises:
            ConfigError: the file cannot be written, or was begun with other settings.
        """
        tokens: list[Token] = []
        seconds = 0.0
        try:
            done = self._begun(prompts, decoder.batch_size)
            for generations, took in decoder.batches(prompts, done):
                seconds += took
                tokens += [token for generation in generations for token in generation.tokens]
                rows = [(row.prompt, row.text, decoder.ended(row)) for row in generations]
                self._append([dict(zip(("prompt", "response", "finished"), row, strict=True)) for row in rows])
            self._finish()
        except OSError as error:
            raise ConfigError(
                f"{str(self.file)!r} cannot be written: {error.strerror}.", hint="Set --out to another path."
            ) from error
        speed = len(tokens) / seconds if seconds else None
        found = {"texts": len(prompts), "resumed_at": done, "seconds": seconds}
        return {"out": str(self.file), **found, "tokens_per_second": speed, "mean_depth": mean_depth(tokens)}

    def _begun(self, prompts: Sequence[str], batch_size: int) -> int:
        """How many prompts are done, in whole batches; what is not is cut off."""
        digest = sha256(json.dumps(list(prompts)).encode()).hexdigest()
        header = json.dumps({**self._settings, "prompts": digest}) + "\n"
        if not self.partial.exists():
            self.partial.write_text(header, encoding="utf-8")
            return 0
        first, *rows = self.partial.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        if first != header:
            self._refuse_other(first, header)
        whole = sum(row.endswith("\n") for row in rows)
        done = whole if whole == len(prompts) else whole - whole % batch_size
        self.partial.write_text(header + "".join(rows[:done]), encoding="utf-8")
        return done

    def _refuse_other(self, first: str, header: str) -> None:
        wanted = json.loads(header)
        try:
            found = json.loads(first)
            other = ", ".join(sorted(name for name in wanted if wanted[name] != found.get(name)))
        except (ValueError, AttributeError):
            other = "its first line is not ours"
        raise ConfigError(
            f"{str(self.partial)!r} was begun with other settings ({other}).",
            hint="Give the command it was begun with, or delete it.",
        )

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with open(self.partial, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _finish(self) -> None:
        staged = self.file.with_name(self.file.name + ".whole")
        rows = self.partial.read_text(encoding="utf-8").split("\n", 1)[1]
        with open(staged, "w", encoding="utf-8") as file:
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, self.file)
        self.partial.unlink()
