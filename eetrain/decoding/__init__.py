"""Decode with fewer layers: the loop, exit policies, the ragged cache and its repair."""

from eetrain.decoding.generation import generate
from eetrain.decoding.loop import EarlyExitOutput
from eetrain.decoding.policies import Always, Never, Policy, Route, Threshold, parse_policy

__all__ = [
    "Always",
    "EarlyExitOutput",
    "Never",
    "Policy",
    "Route",
    "Threshold",
    "generate",
    "parse_policy",
]
