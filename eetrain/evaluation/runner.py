"""Run policies over prompts: quality, depth, agreement and time from the same generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from eetrain.data.tokenization import Example, TextEncoder
from eetrain.decoding import parse_policy
from eetrain.errors import ConfigError
from eetrain.evaluation.agreement import DepthScore, teacher_forced
from eetrain.evaluation.environment import environment
from eetrain.evaluation.forced import ReferenceScore, forced_nll
from eetrain.evaluation.metrics import quality_rows
from eetrain.evaluation.outputs import Outputs, prompt_entries
from eetrain.evaluation.passes import decode_all
from eetrain.evaluation.report import Report
from eetrain.evaluation.rows import exit_row, policy_row
from eetrain.evaluation.samples import Sample
from eetrain.evaluation.settings import REFERENCE, EvaluationSettings

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


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
        parse_policy(policy).check(model)
    likelihood = settings.likelihood or not all(sample.references for sample in samples)
    outputs = decode_all(model, encoder, samples, settings, on_step)
    agreements = {
        policy: _scored(model, encoder, _given(samples, output), settings, f"full depth on {policy}", on_step)
        for policy, output in outputs.items()
    }
    examples = [example for sample in samples for example in sample.examples]
    references = _scored(model, encoder, examples, settings, "references", on_step)
    forced = _forced(model, encoder, samples, settings, on_step) if likelihood else {}
    entries = prompt_entries(encoder, samples, outputs, forced)
    qualities = quality_rows(entries, list(outputs), REFERENCE)
    return Report(
        settings=asdict(settings) | {"policies": list(outputs), "likelihood": likelihood},
        environment=environment(model.device) | {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")},
        num_blocks=model.num_blocks,
        policies=[
            policy_row(policy, qualities[policy], output, outputs[REFERENCE], agreements[policy][-1].accuracy)
            for policy, output in outputs.items()
        ],
        exits=[
            exit_row(own, given, model.num_blocks) for own, given in zip(agreements[REFERENCE], references, strict=True)
        ],
        timings={policy: [vars(timing) for timing in output.timings] for policy, output in outputs.items()},
        outputs=entries,
    )


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


def _forced(
    model: MultiExitModel,
    encoder: TextEncoder,
    samples: Sequence[Sample],
    settings: EvaluationSettings,
    on_step: Callable[[str, int, int], None],
) -> dict[str, list[ReferenceScore]]:
    policies = settings.all_policies
    total = len(policies) * -(-len(samples) // settings.batch_size)
    counted = iter(range(1, total + 1))
    return {
        policy: forced_nll(
            model,
            policy,
            samples,
            batch_size=settings.batch_size,
            pad_id=encoder.pad_id,
            on_batch=lambda: on_step("likelihood of references", next(counted), total),
        )
        for policy in policies
    }
