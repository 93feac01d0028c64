"""Exits of a decoder: where they stand, what their heads are made of, and the model that ties them to a backbone."""

from eetrain.exits.config import ExitConfig
from eetrain.exits.gates import Gate, GateConfig
from eetrain.exits.heads import ExitHead
from eetrain.exits.model import MultiExitModel, MultiExitOutput

__all__ = ["ExitConfig", "ExitHead", "Gate", "GateConfig", "MultiExitModel", "MultiExitOutput"]
