"""The splits of a data set as tokenised rows and prompts, each read on first use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from eetrain.data.batches import PromptRows, TokenRows
from eetrain.data.packing import cut
from eetrain.data.sampling import epoch_order
from eetrain.data.sources import Row, read_rows
from eetrain.data.templates import Template
from eetrain.data.tokenization import Example, TextEncoder, TokenTable
from eetrain.errors import ConfigError, DataError

Split = Literal["train", "validation", "test", "predict"]
HUB_SPLIT: dict[Split, str] = {
    "train": "train",
    "validation": "validation",
    "test": "test",
    "predict": "test",
}
"""The split of a hub data set that is read where the source names none."""
_CHUNK = 1000


@dataclass
class Corpus:
    """Reads splits; the arguments are those of `CausalLMDataModule`.

    With `validation_fraction` both splits are read from the training sources, as one table of which each
    takes its documents: the first ``round(fraction * documents)`` of a permutation by `seed` are held out,
    each part in file order.
    """

    sources: Mapping[Split, list[str]]
    template: Template
    encoder: TextEncoder
    max_length: int
    packing: bool
    overflow: Literal["split", "truncate", "error"]
    seed: int
    limit: int | None
    validation_fraction: float | None
    _tables: dict[Split, TokenTable] = field(default_factory=dict)
    _rows: dict[Split, TokenRows] = field(default_factory=dict)
    _prompts: dict[Split, PromptRows] = field(default_factory=dict)

    def has(self, split: Split) -> bool:
        """Tell whether there is something to read for a split."""
        held_out = split == "validation" and self.validation_fraction is not None
        return bool(self.sources[split]) or (held_out and bool(self.sources["train"]))

    def rows(self, split: Split) -> TokenRows:
        """Return the tokenised rows of a split.

        Raises:
            ConfigError: no source is set for the split.
            DataError: a source cannot be read, or nothing in it can be scored.
        """
        if split not in self._rows:
            table = self._table(split)
            overflow = "truncate" if self.overflow == "error" else self.overflow
            pieces = cut(table, self._documents(split, len(table)), self.max_length, overflow)
            if len(pieces.spans) == 0:
                raise DataError(
                    f"The {split} data hold no token to score within max_length {self.max_length}.",
                    hint="Raise max_length, or check that the template's response is not empty.",
                )
            if pieces.skipped:
                rank_zero_warn(
                    f"{pieces.skipped} of the {split} documents are left out: no scored token fits into "
                    f"max_length {self.max_length}."
                )
            self._rows[split] = TokenRows(table, pieces, self.max_length if self.packing else None)
        return self._rows[split]

    def prompts(self, split: Split) -> PromptRows:
        """Return the prompts of a split and the rows they came from; prompts too long lose their start.

        Raises:
            ConfigError: no source is set for the split.
            DataError: a source cannot be read, or a prompt is empty or, with ``overflow: error``, too long.
        """
        if split not in self._prompts:
            rows = list(self._read(split))
            rows = [rows[i] for i in self._documents(split, len(rows))]
            prompts = [self._prompt(row) for row in rows]
            too_long = sum(len(prompt) > self.max_length for prompt in prompts)
            if too_long:
                rank_zero_warn(f"{too_long} prompts lose their start: max_length is {self.max_length}.")
            self._prompts[split] = PromptRows(rows, [prompt[-self.max_length :] for prompt in prompts])
        return self._prompts[split]

    def _prompt(self, row: Row) -> list[int]:
        ids = self.template.prompt_ids(row, self.encoder)
        if not ids:
            raise DataError(
                f"{row.origin}: the prompt has no tokens.", hint="Start prompts with bos, or give them text."
            )
        self._check_length(ids, row.origin)
        return ids

    def _table(self, split: Split) -> TokenTable:
        source = self._source_of(split)
        if source not in self._tables:
            self._tables[source] = TokenTable(self._examples(self._read(split)))
        return self._tables[source]

    def _examples(self, rows: Iterable[Row]) -> Iterator[Example]:
        rows = iter(rows)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            for example in self.template.encode(chunk, self.encoder):
                self._check_length(example.ids, example.origin)
                yield example

    def _check_length(self, ids: list[int], origin: str) -> None:
        if self.overflow == "error" and len(ids) > self.max_length:
            raise DataError(
                f"{origin}: {len(ids)} tokens do not fit into max_length {self.max_length}.",
                hint="Raise max_length, shorten the row, or set overflow: truncate.",
            )

    def _read(self, split: Split) -> Iterator[Row]:
        source = self._source_of(split)
        if not self.sources[source]:
            raise ConfigError(
                f"No {split} data are set.", hint=f"Set data.{split} to a file, a pattern or hub:owner/name."
            )
        return read_rows(self.sources[source], HUB_SPLIT[source], self.limit)

    def _source_of(self, split: Split) -> Split:
        held_out = split == "validation" and self.validation_fraction is not None
        return "train" if held_out else split

    def _documents(self, split: Split, count: int) -> list[int]:
        """Return which of the `count` documents of its source a split takes, in file order."""
        if self.validation_fraction is None or split not in ("train", "validation"):
            return list(range(count))
        held_out = round(count * self.validation_fraction)
        if not 0 < held_out < count:
            raise ConfigError(
                f"validation_fraction {self.validation_fraction} of {count} documents leaves {held_out} "
                "for validation and "
                f"{count - held_out} for training.",
                hint="Choose a fraction that leaves both at least one.",
            )
        shuffled: list[int] = epoch_order(count, self.seed, epoch=-1).tolist()
        return sorted(shuffled[:held_out] if split == "validation" else shuffled[held_out:])
