"""Lossless self-speculation: exits draft, the remaining blocks verify, each row at its own pace."""

from eetrain.decoding.speculation.policy import Speculation, Speculative

__all__ = ["Speculation", "Speculative"]
