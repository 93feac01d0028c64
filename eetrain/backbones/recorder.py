"""Stand-ins for blocks that record what they are called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """Arguments of a block besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output, which is a tensor or a tuple that starts with one."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class Recorder(nn.Module):
    """Stands where a block stood: keeps the arguments, returns the hidden state as it came.

    Args:
        block: the real block; its attributes (``attention_type``, say) stay readable through the recorder.
        returns_tuple: whether the family's blocks return a tuple.
    """

    call: Call | None
    hidden: Tensor | None

    def __init__(self, block: nn.Module, returns_tuple: bool = False) -> None:
        super().__init__()
        # Past nn.Module's __setattr__: the block must not become a submodule, and this is the decoding loop's hot path.
        self.__dict__.update(block=block, returns_tuple=returns_tuple, call=None, hidden=None)

    def take(self) -> tuple[Call | None, Tensor | None]:
        """What was recorded, which is forgotten."""
        fields = self.__dict__
        recorded = fields["call"], fields["hidden"]
        fields["call"] = fields["hidden"] = None
        return recorded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record and pass on."""
        if args:
            hidden, rest = args[0], args[1:]
        else:
            kwargs = dict(kwargs)
            hidden, rest = kwargs.pop("hidden_states"), ()
        self.__dict__.update(call=Call(rest, kwargs), hidden=hidden)
        return (hidden,) if self.returns_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


class Tap(Recorder):
    """A recorder that also runs the real block and keeps its output."""

    output: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record, then run the block."""
        super().forward(*args, **kwargs)
        self.__dict__["output"] = self._run(*args, **kwargs)
        return self.__dict__["output"]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.__dict__["block"](*args, **kwargs)
        except RuntimeError:
            hidden: Tensor = self.__dict__["hidden"]
            if not hidden.is_meta:
                raise
            # Routers ask for values, and the meta device has none; blocks with experts return a tensor of that shape.
            return hidden
