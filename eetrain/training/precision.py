"""Tables that must keep their precision when a model is cast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def keeping_tables(module: nn.Module) -> Iterator[None]:
    """Undo casts of non-persistent buffers inside, moves between devices excepted.

    Rotary frequencies are such buffers. transformers keeps them in float32 under any dtype; `module.to(bfloat16)`,
    which is what `Trainer(precision="bf16-true")` does, would round them and shift the positions of long texts.
    """
    kept: list[tuple[nn.Module, str, Tensor]] = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name in owner._non_persistent_buffers_set and buffer.is_floating_point()
    ]
    yield
    for owner, name, buffer in kept:
        cast = owner.get_buffer(name)
        if cast.dtype != buffer.dtype:
            owner.register_buffer(name, buffer.to(cast.device), persistent=False)
