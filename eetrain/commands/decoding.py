"""Prompts decoded a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from eetrain.commands.output import progress
from eetrain.data.tokenization import TextEncoder
from eetrain.decoding import Policy
from eetrain.errors import ConfigError
from eetrain.evaluation.batches import left_padded
from eetrain.exits import MultiExitModel
from eetrain.viewing import Generation


@dataclass(frozen=True)
class Decoder:
    """A model and how it continues texts.

    Args:
        model: in evaluation mode.
        encoder: of its tokenizer.
        policy: which blocks run.
        options: of ``generate``.
        batch_size: prompts decoded together.
        bos: see :meth:`eetrain.data.tokenization.TextEncoder.start_ids`.
        seed: of the sampling. Every batch has its own, so that decoding may begin at any of them.
    """

    model: MultiExitModel
    encoder: TextEncoder
    policy: Policy
    options: dict[str, Any]
    batch_size: int
    bos: bool | None
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the texts depend on beside model and prompts, as JSON has it."""
        own = {"policy": str(self.policy), "bos": self.bos, "seed": self.seed, "batch_size": self.batch_size}
        return {**own, **self.options}

    def batches(self, prompts: Sequence[str], done: int = 0) -> Iterator[tuple[list[Generation], float]]:
        """Continuations of a batch of prompts and the seconds they took, from prompt ``done`` on.

        Raises:
            ConfigError: a prompt without tokens.
        """
        ids = [self.encoder.start_ids(self.bos) + tokens for tokens in self.encoder.encode(prompts)]
        for prompt, tokens in zip(prompts, ids, strict=True):
            if not tokens:
                raise ConfigError(f"The prompt {prompt!r} has no tokens.", hint="Write some text, or set --bos true.")
        with progress(enabled="streamer" not in self.options) as on_step:
            for start in range(done, len(prompts), self.batch_size):
                torch.manual_seed(self.seed + start)
                end = min(start + self.batch_size, len(prompts))
                yield self._batch(prompts[start:end], ids[start:end])
                on_step("decoding", end, len(prompts))

    def _batch(self, prompts: Sequence[str], ids: Sequence[Sequence[int]]) -> tuple[list[Generation], float]:
        inputs, mask = left_padded(ids, self.encoder.pad_id, self.model.device)
        began = perf_counter()
        output = self.model.generate(
            inputs, attention_mask=mask, exit_policy=self.policy, return_dict_in_generate=True, **self.options
        )
        new, depths = output.sequences[:, inputs.shape[1] :].tolist(), output.exit_trace.tolist()
        seconds = perf_counter() - began
        drafts = output.exit_trace * 0 if output.draft_trace is None else output.draft_trace
        rows = zip(prompts, new, depths, drafts.tolist(), strict=True)
        return [Generation.read(self.encoder.tokenizer, *row) for row in rows], seconds

    def ended(self, generation: Generation) -> bool:
        """Whether a text came to its end, and was not cut off."""
        named = self.options.get("eos_token_id", self.model.causal_lm.generation_config.eos_token_id)
        ends = named if isinstance(named, list) else [named]
        return bool(generation.tokens) and generation.tokens[-1].id in ends
