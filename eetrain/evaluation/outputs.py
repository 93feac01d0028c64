"""What policies generated for all prompts, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eetrain.data.tokenization import TextEncoder
from eetrain.decoding import Speculation
from eetrain.evaluation.forced import ReferenceScore
from eetrain.evaluation.samples import Sample
from eetrain.evaluation.timing import Timing
from eetrain.viewing import decoded_text


@dataclass
class Outputs:
    """What one policy generated.

    Attributes:
        tokens: new ids of every prompt, up to and with its end.
        depths: of these tokens.
        block_calls: blocks times positions after the prompts, repair included.
        timings: one sum over all prompts a timed pass.
        speculation: what drafting came to, under a speculative policy.
    """

    tokens: list[list[int]] = field(default_factory=list)
    depths: list[list[int]] = field(default_factory=list)
    block_calls: int = 0
    timings: list[Timing] = field(default_factory=list)
    speculation: Speculation | None = None


def prompt_entries(
    encoder: TextEncoder,
    samples: Sequence[Sample],
    outputs: Mapping[str, Outputs],
    forced: Mapping[str, Sequence[ReferenceScore]],
) -> list[dict[str, Any]]:
    """One entry a prompt with all that qualities are computed from.

    Keys: ``prompt`` and ``references`` (texts); then for every policy ``texts``, ``tokens`` (their number),
    ``depth_sums`` (blocks run, summed over these tokens) and, where likelihood was measured, ``nll_sums`` (nats of the
    first reference); ``reference_tokens`` is the number of tokens that these stand for, or ``None``.
    """
    scores = list(forced.values())
    return [
        {
            "prompt": decoded_text(encoder.tokenizer, sample.prompt_ids),
            "references": list(sample.references),
            "texts": {name: decoded_text(encoder.tokenizer, output.tokens[place]) for name, output in outputs.items()},
            "tokens": {name: len(output.tokens[place]) for name, output in outputs.items()},
            "depth_sums": {name: sum(output.depths[place]) for name, output in outputs.items()},
            "nll_sums": {name: score[place].nll for name, score in forced.items()},
            "reference_tokens": scores[0][place].tokens if scores else None,
        }
        for place, sample in enumerate(samples)
    ]
