"""What is asked of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from eetrain.decoding import parse_policy
from eetrain.errors import ConfigError

REFERENCE = "never"
"""The policy that the others are compared with."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How to generate and measure.

    Args:
        policies: strings such as ``always:6``; ``never`` is always among them, as what the others are compared with.
        batch_size: prompts decoded together.
        max_new_tokens: a text.
        repeats: timed passes over all prompts, after one that is not timed; 0 measures no time.
        likelihood: also score the references under every policy, which costs one more pass each; done anyway where
            there is no reference text to compare with.
    """

    policies: tuple[str, ...]
    batch_size: int = 1
    max_new_tokens: int = 64
    repeats: int = 3
    likelihood: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("repeats", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}, must be at least {least}.", hint="Raise it.")

    @property
    def all_policies(self) -> tuple[str, ...]:
        """Each policy once, ``never`` first."""
        return tuple(dict.fromkeys((REFERENCE, *(str(parse_policy(policy)) for policy in self.policies))))
