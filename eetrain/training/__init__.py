"""The training run: LightningModule, settings, metrics and callbacks."""

from eetrain.training.module import EarlyExitModule
from eetrain.training.settings import BackboneConfig, LoraSettings, ModelSettings, OptimizerConfig

__all__ = ["BackboneConfig", "EarlyExitModule", "LoraSettings", "ModelSettings", "OptimizerConfig"]
