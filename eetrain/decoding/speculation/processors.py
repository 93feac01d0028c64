"""Logits processors on drafts: which can be applied to tokens that may be taken back, and how.

Rows of a batch have texts of unequal length, and a window has several positions a row. A processor that looks at the
scores alone takes them all at once; one that looks at the text's length takes those of equal length; one that looks at
the text is given one position's own text, padding included, as the loop token by token would give it. What remembers
earlier calls, or is bound to the rows of the batch, cannot be applied.

Shape suffixes: ``B`` rows, ``W`` positions of a window, ``M`` positions taken together,
``V`` vocabulary.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from eetrain.errors import ConfigError

_BY_SCORES = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
}
_BY_LENGTH = {
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
}
_BY_TEXT = {
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "WatermarkLogitsProcessor",
}


class DraftScores:
    """Processed logits of windows.

    Args:
        processors: transformers' list.
        num_rows: of the batch.

    Raises:
        ConfigError: one of them cannot be applied to a draft.
    """

    def __init__(self, processors: Sequence[Any], num_rows: int) -> None:
        for processor in processors:
            _check(processor)
        names = {type(processor).__name__ for processor in processors}
        self._processors: Any = processors
        self._of_row = [_for_row(processors, row) for row in range(num_rows)]
        self._idle = not names
        self._by_text = bool(names - _BY_SCORES - _BY_LENGTH)
        self._by_length = bool(names & _BY_LENGTH)

    def __call__(self, logits_BWV: Tensor, ids_BN: Tensor, first: Sequence[int]) -> Tensor:
        """Scores ``[B, W, V]`` in float32, a copy.

        Args:
            logits_BWV: position ``w`` of row ``b`` follows the text that ends in slot ``first[b] + w``.
            ids_BN: tokens by slot.
            first: one a row.
        """
        scores_BWV = logits_BWV.to(dtype=torch.float32, copy=True)
        if self._idle:
            return scores_BWV
        rows, width, _ = scores_BWV.shape
        if not (self._by_text or self._by_length):
            flat: Tensor = self._processors(ids_BN[:, :0].repeat_interleave(width, 0), scores_BWV.flatten(0, 1))
            return flat.view_as(scores_BWV)
        groups: dict[object, list[tuple[int, int]]] = defaultdict(list)
        for row in range(rows):
            for place in range(width):
                length = first[row] + place + 1
                groups[(row, length) if self._by_text else length].append((row, place))
        for members in groups.values():
            row_M, place_M = torch.tensor(members, device=ids_BN.device).unbind(1)
            text_MN = ids_BN[row_M, : first[members[0][0]] + members[0][1] + 1]
            process = self._of_row[members[0][0]] if self._by_text else self._processors
            scores_BWV[row_M, place_M] = process(text_MN, scores_BWV[row_M, place_M])
        return scores_BWV

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._of_row = [self._of_row[row] for row in rows]


def _for_row(processors: Sequence[Any], row: int) -> LogitsProcessorList:
    """The processors for one row: a repetition penalty knows how much padding each row of the batch has."""
    own = LogitsProcessorList(copy.copy(processor) for processor in processors)
    for processor in own:
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, Tensor):
            processor.prompt_ignore_length = padding[row : row + 1]
    return own


def _check(processor: Any) -> None:
    name = type(processor).__name__
    known = name in _BY_SCORES | _BY_LENGTH | _BY_TEXT and type(processor).__module__.startswith("transformers.")
    if known or getattr(processor, "draftable", False):
        return
    raise ConfigError(
        f"{name} cannot be applied to drafted tokens: it may remember earlier calls, or be bound to the rows of the "
        "batch.",
        hint="Use another policy with it. A processor of your own that is a function of one row's ids and scores alone "
        "may say so by an attribute draftable = True.",
    )
