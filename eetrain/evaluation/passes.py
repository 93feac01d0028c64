"""Decode all prompts under all policies: what was generated, how deep, how long it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from eetrain.data.tokenization import TextEncoder
from eetrain.decoding import Speculation
from eetrain.evaluation.batches import generate_options, left_padded
from eetrain.evaluation.outputs import Outputs
from eetrain.evaluation.samples import Sample
from eetrain.evaluation.settings import EvaluationSettings
from eetrain.evaluation.timing import Timing, timed_generate

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


def decode_all(
    model: MultiExitModel,
    encoder: TextEncoder,
    samples: Sequence[Sample],
    settings: EvaluationSettings,
    on_step: Callable[[str, int, int], None],
) -> dict[str, Outputs]:
    """All policies on each batch in turn, so that a machine that slows down slows all of them down."""
    outputs = {policy: Outputs() for policy in settings.all_policies}
    batches = [samples[start : start + settings.batch_size] for start in range(0, len(samples), settings.batch_size)]
    total, done = (1 + settings.repeats) * len(batches) * len(outputs), 0
    for repeat in range(1 + settings.repeats):
        spent = dict.fromkeys(outputs, Timing())
        for batch in batches:
            ids, mask = left_padded([sample.prompt_ids for sample in batch], encoder.pad_id, model.device)
            for policy, output in outputs.items():
                timing = _decode(model, encoder, policy, ids, mask, settings, output if repeat == 0 else None)
                spent[policy] += timing
                done += 1
                on_step("decoding", done, total)
        if repeat > 0:
            for policy, output in outputs.items():
                output.timings.append(spent[policy])
    return outputs


def _decode(
    model: MultiExitModel,
    encoder: TextEncoder,
    policy: str,
    ids: Tensor,
    mask: Tensor,
    settings: EvaluationSettings,
    keep: Outputs | None,
) -> Timing:
    result, timing = timed_generate(
        model, policy, ids, mask, **generate_options(model, encoder, settings.max_new_tokens)
    )
    if keep is None:
        return timing
    assert result.exit_trace is not None
    assert result.block_calls is not None
    keep.block_calls += result.block_calls
    if result.speculation is not None:
        keep.speculation = (keep.speculation or Speculation()) + result.speculation
    for tokens, depths in zip(result.sequences[:, ids.shape[1] :].tolist(), result.exit_trace.tolist(), strict=True):
        length = sum(depth > 0 for depth in depths)
        keep.tokens.append(tokens[:length])
        keep.depths.append(depths[:length])
    return timing
