"""Early exits for any Hugging Face decoder: train them in, then decode with the layers each token needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eetrain.data import CausalLMDataModule
    from eetrain.exits import ExitConfig, MultiExitModel
    from eetrain.training import EarlyExitModule

__all__ = ["CausalLMDataModule", "EarlyExitModule", "ExitConfig", "MultiExitModel"]

_ROOMS = {
    "CausalLMDataModule": "eetrain.data",
    "EarlyExitModule": "eetrain.training",
    "ExitConfig": "eetrain.exits",
    "MultiExitModel": "eetrain.exits",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds to load."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'eetrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
