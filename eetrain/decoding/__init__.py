"""Decode with fewer layers: the loop, exit policies, the ragged cache and its repair."""

from eetrain.decoding.generation import generate
from eetrain.decoding.loop import EarlyExitOutput
from eetrain.decoding.policies import Always, Gated, Never, Scheduled, Threshold, parse_policy
from eetrain.decoding.policy import ExitPolicy, Policy, Route
from eetrain.decoding.speculation import Speculation, Speculative
from eetrain.decoding.start import start

__all__ = [
    "Always",
    "EarlyExitOutput",
    "ExitPolicy",
    "Gated",
    "Never",
    "Policy",
    "Route",
    "Scheduled",
    "Speculation",
    "Speculative",
    "Threshold",
    "generate",
    "parse_policy",
    "start",
]
