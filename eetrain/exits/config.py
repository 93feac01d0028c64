"""The settings of a model's exits, as they stand in YAML and in a checkpoint's ``config.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from eetrain.errors import CheckpointError, ConfigError
from eetrain.exits.gates import GateConfig
from eetrain.exits.placement import resolve_layers

HeadKind = Literal["tied", "norm", "mlp", "block"]
OutputKind = Literal["tied", "own"]


@dataclass(frozen=True)
class ExitConfig:
    """Which exits a model has and what their heads are made of.

    Placement: exactly one of ``layers``, ``every``, ``fractions``; see :func:`resolve_layers`.

    Args:
        layers: blocks after which exits stand, counted from 1; ``[]`` for a plain decoder.
        every: an exit after every n-th block.
        fractions: exits at these shares of the depth.
        head: what stands between hidden state and output matrix. ``tied``: the backbone's final norm; ``norm``: a
            norm of its own; ``mlp``: ``h + MLP(N(h))`` with a copy of the exit's own block, then a norm of its own;
            ``block``: a copy of the last block, then a norm of its own (EE-Tuning, arXiv 2402.00518, section 3).
        output: ``tied`` uses the backbone's output matrix; ``own`` starts as a copy of it.
        gates: learned rules of leaving, at every exit below the last block; none if left out.

    Raises:
        ConfigError: an unknown kind, or ``head="tied"`` with a matrix of its own.
    """

    layers: list[int] | None = None
    every: int | None = None
    fractions: list[float] | None = None
    head: HeadKind = "norm"
    output: OutputKind = "tied"
    gates: GateConfig | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("head", HeadKind), ("output", OutputKind)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ConfigError(
                    f"exits.{name}={value!r} is not known.", hint=f"One of: {', '.join(get_args(kinds))}."
                )
        if self.head == "tied" and self.output == "own":
            raise ConfigError(
                "exits.head=tied has no parameters, but exits.output=own asks for an output matrix.",
                hint="Set exits.head=norm with exits.output=own, or leave exits.output=tied.",
            )

    def resolved(self, num_blocks: int) -> ExitConfig:
        """The same exits as explicit ``layers`` of a backbone with ``num_blocks`` blocks."""
        layers = resolve_layers(num_blocks, self.layers, self.every, self.fractions)
        return replace(self, layers=list(layers), every=None, fractions=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``config.json``; placement must be resolved."""
        assert self.layers is not None
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExitConfig:
        """Read what :meth:`to_dict` wrote.

        Raises:
            CheckpointError: a key this version does not know.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(
                f"The checkpoint's exits have settings this version does not know: {', '.join(unknown)}.",
                hint="Load it with the eetrain version that wrote it, or a newer one.",
            )
        gates = data.get("gates")
        return cls(**{**data, "gates": None if gates is None else GateConfig.from_dict(gates)})
