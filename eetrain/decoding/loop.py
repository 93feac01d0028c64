"""The decoding loop: logits from the runner, a token from the logits, until every row has ended.

What surrounds the model's forward is transformers' own: logits processors, stopping criteria, streamers, outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from eetrain.decoding.runner import StepRunner
from eetrain.decoding.speculation import Speculation


@dataclass
class EarlyExitOutput(GenerateDecoderOnlyOutput):
    """transformers' output plus what each token cost.

    Attributes:
        exit_trace: depth of every generated token, ``[B, new]``; 0 after a row's end.
        block_calls: blocks times positions computed after the prompt, repair and rejected drafts included.
        speculation: what drafting came to, under a speculative policy.
        draft_trace: the exit that drafted each token, ``[B, new]``, 0 for those from the full depth; under a
            speculative policy, where every token has run all blocks.
    """

    exit_trace: Tensor | None = None
    block_calls: int | None = None
    speculation: Speculation | None = None
    draft_trace: Tensor | None = None


def decode(
    runner: StepRunner,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
) -> Tensor | EarlyExitOutput:
    """Decode until all rows have ended.

    Args:
        runner: set up on the same prompts.
        input_ids: prompts ``[B, T]``.
        logits_processor: transformers' list, applied to float32 logits.
        stopping_criteria: transformers' list.
        generation_config: prepared by ``generate``.
        streamer: gets every new token of every row, then ``end()``; one with a method ``put_depths`` gets the depths
            ``[B]`` ahead of the tokens.

    Returns:
        Ids ``[B, T + new]``, or an :class:`EarlyExitOutput` with ``return_dict_in_generate``.
    """
    with torch.inference_mode():
        result = _decode(runner, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    return outside_inference_mode(result)


def outside_inference_mode(result: Tensor | EarlyExitOutput) -> Tensor | EarlyExitOutput:
    """Copies that autograd accepts: tensors made in inference mode cannot be inputs of training."""
    if isinstance(result, Tensor):
        return result.clone()
    for name, value in result.items():
        if isinstance(value, Tensor):
            result[name] = value.clone()
        elif isinstance(value, tuple):
            result[name] = tuple(item.clone() for item in value)
    return result


def _decode(
    runner: StepRunner,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
) -> Tensor | EarlyExitOutput:
    pad = generation_config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    rows = list(range(len(input_ids)))
    record = _Record(generation_config)
    logits, depth = runner.prefill()
    while True:
        logits, depth = _all_rows(logits, depth, rows, len(unfinished))
        logits = logits.to(dtype=torch.float32, copy=True)
        scores = logits_processor(input_ids, logits)
        record.add(scores, logits, depth)
        tokens = _pick(scores, generation_config.do_sample)
        if ends and not unfinished.all():
            tokens = torch.where(unfinished, tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, record.scores)
        if streamer is not None:
            _stream(streamer, tokens, depth)
        alive = unfinished.tolist()
        if not any(alive):
            break
        if ends and not all(alive[row] for row in rows):
            runner.keep([place for place, row in enumerate(rows) if alive[row]])
            rows = [row for row in rows if alive[row]]
        logits, depth = runner.step(tokens if len(rows) == len(tokens) else tokens[rows])
    if streamer is not None:
        streamer.end()
    return record.output(input_ids, runner)


def _stream(streamer: Any, tokens: Tensor, depth: Tensor) -> None:
    if hasattr(streamer, "put_depths"):
        streamer.put_depths(depth.cpu())
    streamer.put(tokens.cpu())


def _pick(scores: Tensor, do_sample: bool) -> Tensor:
    if not do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


def _all_rows(logits: Tensor, depth: Tensor, rows: list[int], num_rows: int) -> tuple[Tensor, Tensor]:
    """Spread the running rows over the batch; rows that have ended get zeros."""
    if len(rows) == num_rows:
        return logits, depth
    spread_logits = logits.new_zeros(num_rows, logits.shape[-1])
    spread_depth = depth.new_zeros(num_rows)
    spread_logits[rows], spread_depth[rows] = logits, depth
    return spread_logits, spread_depth


class _Record:
    """What ``return_dict_in_generate`` asks to keep."""

    def __init__(self, generation_config: Any) -> None:
        self.wanted = bool(generation_config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if self.wanted and generation_config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if self.wanted and generation_config.output_logits else None
        self.depths: list[Tensor] = []

    def add(self, scores: Tensor, logits: Tensor, depth: Tensor) -> None:
        if not self.wanted:
            return
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        self.depths.append(depth)

    def output(self, input_ids: Tensor, runner: StepRunner) -> Tensor | EarlyExitOutput:
        if not self.wanted:
            return input_ids
        return EarlyExitOutput(
            sequences=input_ids,
            scores=self.scores,
            logits=self.logits,
            exit_trace=torch.stack(self.depths, dim=1),
            block_calls=runner.block_calls,
        )
