"""One policy on one model as a point of the frontier, and how it is called there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FrontierPoint:
    """One policy on one model.

    Attributes:
        policy: its string.
        quality: on the vertical axis.
        blocks: computed for a token on average; ``None`` if no token was decoded after a prompt.
        speedup: measured, of decoding over ``never`` of the same run, or ``None``: runs on a shared machine differ in
            tokens per second.
        model: name of the checkpoint, where several are in one picture.
        low: lower end of the quality's interval, or ``None``.
        high: upper end.
    """

    policy: str
    quality: float
    blocks: float | None
    speedup: float | None
    model: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def kind(self) -> str:
        """The policy without its main numbers, short: what points of one line have in common.

        ``threshold:0.7,repair=propagate`` is of the kind ``threshold, propagate``, ``threshold:0.7,cap=3`` of the kind
        ``threshold, cap=3``, ``skipdecode:max=9,min=3,length=26`` of the kind ``skipdecode max/min, length=26``, and
        ``gate:0.5,cost_weight=0.3`` of the kind ``gate cost_weight``.
        """
        name, numbers, rest = _parts(self.policy)
        named = [key for key, _ in numbers if key]
        return ", ".join([f"{name} {'/'.join(named)}" if named else name, *rest])

    @property
    def series(self) -> str:
        """The kind, after the model's name if there is one."""
        return f"{self.model}: {self.kind}" if self.model else self.kind

    @property
    def number(self) -> str:
        """The policy's main numbers, such as ``0.7`` or ``9/3``; empty for ``never``."""
        return "/".join(value for _, value in _parts(self.policy)[1])


_USUAL_GATE = "0.5"
_SIDE = ("length", "warmup", "stages")


def _parts(policy: str) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Name, main numbers as key and value, and the other options, words without their keys.

    A policy whose first argument has a key (``max=9``) has its other numbers among the main ones, except lengths and
    the like. What tells gates of one checkpoint apart is their cost weight.
    """
    head, *options = policy.split(",")
    name, _, argument = head.partition(":")
    key, equals, value = argument.rpartition("=")
    numbers = [(key, value)] if argument else []
    rest = []
    weights = [option for option in options if option.startswith("cost_weight=")]
    if weights:
        options.remove(weights[0])
        rest = [] if value == _USUAL_GATE else [value]
        numbers = [("cost_weight", weights[0].partition("=")[2])]
    for option in options:
        option_key, _, option_value = option.partition("=")
        if not option_value[:1].isdigit():
            rest.append(option_value)
        elif equals and option_key not in _SIDE:
            numbers.append((option_key, option_value))
        else:
            rest.append(option)
    return name, numbers, rest
