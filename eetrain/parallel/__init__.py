"""Training on several processes: pipelines with exits on any stage, sharded parameters, and what they cost."""

from eetrain.parallel.strategy import PipelineStrategy
from eetrain.parallel.zero import ZeroStrategy

__all__ = ["PipelineStrategy", "ZeroStrategy"]
