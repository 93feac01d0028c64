"""What a policy generated for all prompts, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field

from eetrain.evaluation.timing import Timing


@dataclass
class Outputs:
    """What one policy generated.

    Attributes:
        tokens: new ids of every prompt, up to and with its end.
        depths: of these tokens.
        block_calls: blocks times positions after the prompts, repair included.
        timings: one sum over all prompts a timed pass.
    """

    tokens: list[list[int]] = field(default_factory=list)
    depths: list[list[int]] = field(default_factory=list)
    block_calls: int = 0
    timings: list[Timing] = field(default_factory=list)
