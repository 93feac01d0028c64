"""Training on several processes: pipelines with exits on any stage, and sharded parameters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eetrain.parallel.strategy import PipelineStrategy
    from eetrain.parallel.zero import ZeroStrategy

__all__ = ["PipelineStrategy", "ZeroStrategy"]

_MODULES = {"PipelineStrategy": "eetrain.parallel.strategy", "ZeroStrategy": "eetrain.parallel.zero"}


def __getattr__(name: str) -> Any:
    """Import a strategy when it is first used: nothing else here needs Lightning or DeepSpeed."""
    if name not in _MODULES:
        raise AttributeError(f"module 'eetrain.parallel' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
