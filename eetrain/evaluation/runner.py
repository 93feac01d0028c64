"""Run policies over prompts: quality, depth, agreement and time from the same generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from eetrain.data.tokenization import Example, TextEncoder
from eetrain.decoding import parse_policy
from eetrain.errors import ConfigError
from eetrain.evaluation.agreement import DepthScore, teacher_forced
from eetrain.evaluation.batches import generate_options, left_padded
from eetrain.evaluation.environment import environment
from eetrain.evaluation.outputs import Outputs
from eetrain.evaluation.report import Report, exit_row, policy_row
from eetrain.evaluation.samples import Sample
from eetrain.evaluation.timing import Timing, timed_generate
from eetrain.viewing import decoded_text

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel

REFERENCE = "never"


@dataclass(frozen=True)
class EvaluationSettings:
    """How to generate and measure.

    Args:
        policies: strings such as ``always:6``; ``never`` is always among them, as what the others are compared with.
        batch_size: prompts decoded together.
        max_new_tokens: a text.
        repeats: timed passes over all prompts, after one that is not timed; 0 measures no time.
    """

    policies: tuple[str, ...]
    batch_size: int = 1
    max_new_tokens: int = 64
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("repeats", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}, must be at least {least}.", hint="Raise it.")

    @property
    def all_policies(self) -> tuple[str, ...]:
        """Each policy once, ``never`` first."""
        return tuple(dict.fromkeys((REFERENCE, *(str(parse_policy(policy)) for policy in self.policies))))


def evaluate_policies(
    model: MultiExitModel,
    encoder: TextEncoder,
    samples: Sequence[Sample],
    settings: EvaluationSettings,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Decode all samples greedily under every policy and measure.

    Args:
        model: in eval mode, with its whole backbone.
        encoder: the model's tokenizer.
        samples: prompts with their references.
        settings: see there.
        on_step: told what is going on, how many steps of it are done, and of how many.

    Raises:
        ConfigError: a policy does not parse or fit the model, or the model lacks its full depth.
    """
    if not model.full_depth_loaded:
        raise ConfigError("The model was loaded without its full depth.", hint="Load the whole backbone (depth=None).")
    for policy in settings.all_policies:
        parse_policy(policy).route(model.exit_layers, model.num_blocks)
    outputs = _decode_all(model, encoder, samples, settings, on_step)
    texts = {
        policy: [decoded_text(encoder.tokenizer, ids) for ids in output.tokens] for policy, output in outputs.items()
    }
    scores = {
        policy: _scored(model, encoder, _given(samples, output), settings, f"full depth on {policy}", on_step)
        for policy, output in outputs.items()
    }
    examples = [example for sample in samples for example in sample.examples]
    references = _scored(model, encoder, examples, settings, "references", on_step)
    reference = outputs[REFERENCE]
    return Report(
        settings=asdict(settings) | {"policies": list(outputs)},
        environment=environment(model.device) | {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")},
        num_blocks=model.num_blocks,
        policies=[
            policy_row(policy, output, reference, texts[policy], samples, scores[policy][-1].accuracy)
            for policy, output in outputs.items()
        ],
        exits=[
            exit_row(own, given, model.num_blocks) for own, given in zip(scores[REFERENCE], references, strict=True)
        ],
        timings={policy: [vars(timing) for timing in output.timings] for policy, output in outputs.items()},
        outputs=[
            {
                "prompt": decoded_text(encoder.tokenizer, sample.prompt_ids),
                "references": list(sample.references),
                "texts": {policy: texts[policy][place] for policy in outputs},
            }
            for place, sample in enumerate(samples)
        ],
    )


def _decode_all(
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
    for tokens, depths in zip(result.sequences[:, ids.shape[1] :].tolist(), result.exit_trace.tolist(), strict=True):
        length = sum(depth > 0 for depth in depths)
        keep.tokens.append(tokens[:length])
        keep.depths.append(depths[:length])
    return timing


def _given(samples: Sequence[Sample], output: Outputs) -> list[Example]:
    """The generated texts behind their prompts, as given text."""
    return [
        Example(list(sample.prompt_ids) + ids, [False] * len(sample.prompt_ids) + [True] * len(ids), "generated")
        for sample, ids in zip(samples, output.tokens, strict=True)
    ]


def _scored(
    model: MultiExitModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    what: str,
    on_step: Callable[[str, int, int], None],
) -> list[DepthScore]:
    size = max(settings.batch_size, 8)
    total = -(-len(examples) // size)
    counted = iter(range(1, total + 1))
    return teacher_forced(
        model, examples, batch_size=size, pad_id=encoder.pad_id, on_batch=lambda: on_step(what, next(counted), total)
    )
