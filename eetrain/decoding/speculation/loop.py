"""The decoding loop of self-speculation: a round gives each row one token or more.

Shape suffixes: ``B`` rows of the batch, ``W`` positions of a round, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eetrain.decoding.loop import EarlyExitOutput, outside_inference_mode
from eetrain.decoding.speculation.acceptance import draw
from eetrain.decoding.speculation.processors import DraftScores
from eetrain.decoding.speculation.round import Choice
from eetrain.decoding.speculation.runner import Gained, SpeculativeRunner
from eetrain.decoding.speculation.transcript import Transcript


def decode_speculatively(
    runner: SpeculativeRunner,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
) -> Tensor | EarlyExitOutput:
    """Decode until all rows have ended; arguments and result are those of :func:`eetrain.decoding.loop.decode`.

    Stopping criteria see one row at a time, and no scores.

    Raises:
        ConfigError: a logits processor cannot be applied to drafts.
    """
    pad = generation_config._pad_token_tensor
    fill = 0 if pad is None else int(pad)
    transcript = Transcript(input_ids, stopping_criteria, fill, runner.model.num_blocks, streamer)
    scores = DraftScores(logits_processor, len(input_ids))
    runner.choice = Choice(scores, bool(generation_config.do_sample), transcript.end_tokens)
    record = _Record(generation_config, len(input_ids))
    with torch.inference_mode():
        _decode(runner, transcript, record)
        sequences, drafted_by, made = transcript.finish()
        result: Tensor | EarlyExitOutput = sequences
        if generation_config.return_dict_in_generate:
            result = EarlyExitOutput(
                sequences=sequences,
                scores=record.columns(record.scores, transcript.longest),
                logits=record.columns(record.logits, transcript.longest),
                exit_trace=made * runner.model.num_blocks,
                draft_trace=drafted_by,
                block_calls=runner.block_calls,
                speculation=runner.speculation,
            )
    return outside_inference_mode(result)


def _decode(runner: SpeculativeRunner, transcript: Transcript, record: _Record) -> None:
    rows = list(range(len(transcript.rows)))
    _add(transcript, record, rows, _first(runner), runner)
    while running := transcript.running:
        if len(running) < len(rows):
            runner.keep([place for place, row in enumerate(rows) if row in running])
            rows = running
        _add(transcript, record, rows, runner.round([transcript.room(row) for row in rows]), runner)


def _first(runner: SpeculativeRunner) -> Gained:
    """The prompt's pass and the token it predicts."""
    logits_BV, _ = runner.prefill()
    logits_B1V = logits_BV[:, None]
    scores_B1V = runner.choice.scores(logits_B1V, runner.ids, [runner.prompt_slots - 1] * len(logits_BV))
    scores_BV = scores_B1V[:, 0]
    runner.feed(draw(scores_BV.softmax(dim=-1)) if runner.choice.samples else scores_BV.argmax(dim=-1))
    rows = len(logits_BV)
    return Gained([1] * rows, [[0]] * rows, logits_B1V, scores_B1V)


def _add(transcript: Transcript, record: _Record, rows: list[int], gained: Gained, runner: SpeculativeRunner) -> None:
    """Write a round's tokens down; those of a row are the last ones the runner has."""
    for place, row in enumerate(rows):
        tokens = runner.newest_tokens(place, gained.counts[place])
        taken = transcript.add(row, tokens, gained.drafted_by[place])
        record.add(row, gained, place, taken)
    transcript.stream()


class _Record:
    """What ``return_dict_in_generate`` asks to keep, token by token of each row."""

    def __init__(self, generation_config: Any, num_rows: int) -> None:
        wanted = bool(generation_config.return_dict_in_generate)

        def rows(setting: bool | None) -> list[list[Tensor]] | None:
            return [[] for _ in range(num_rows)] if wanted and setting else None

        self.scores = rows(generation_config.output_scores)
        self.logits = rows(generation_config.output_logits)

    def add(self, row: int, gained: Gained, place: int, taken: int) -> None:
        """Keep the scores of a row's newest tokens."""
        if self.scores is not None:
            self.scores[row] += gained.scores_BWV[place, :taken].unbind(0)
        if self.logits is not None:
            self.logits[row] += gained.logits_BWV[place, :taken].float().unbind(0)

    @staticmethod
    def columns(kept: list[list[Tensor]] | None, longest: int) -> tuple[Tensor, ...] | None:
        """One tensor ``[B, V]`` a token, zeros behind a row's end."""
        if kept is None:
            return None
        blank = torch.zeros_like(kept[0][0])
        return tuple(torch.stack([row[at] if at < len(row) else blank for row in kept]) for at in range(longest))
