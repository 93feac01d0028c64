"""Asking for the cut-cross-entropy kernels where they cannot run says why, before anything is computed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from eetrain.backbones.projection import Projection
from eetrain.errors import ConfigError
from eetrain.objectives.linear_ce import linear_cross_entropy
from eetrain.objectives.teacher import Distillation, Teacher

HIDDEN, WEIGHT, LABELS = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
TEACHER = Teacher(HIDDEN, Projection(WEIGHT), Distillation())


def call(head=None, **settings):
    linear_cross_entropy([HIDDEN], [head or Projection(WEIGHT)], LABELS, exit_weights=[1.0], kernel="cce", **settings)


@pytest.mark.parametrize(
    ("head", "settings", "reason"),
    [
        (None, {"statistics": "basic"}, "computes no token statistics .statistics='basic'."),
        (None, {"token_weights": lambda s: s.max_prob}, "cannot weight tokens by their own confidence"),
        (None, {"teacher": TEACHER}, "knows labels only, and exits are distilled from the full depth"),
        (Projection(WEIGHT, scale=0.5), {}, "cannot scale logits"),
        (Projection(WEIGHT, bias=torch.zeros(5)), {}, "knows no bias"),
    ],
)
def test_what_the_kernels_cannot_do(head, settings, reason):
    with pytest.raises(ConfigError, match=f"kernel='cce' was asked for, but it {reason}") as caught:
        call(head, **settings)
    assert caught.value.hint == "set kernel='torch'."


def test_package_or_device_missing():
    installed = importlib.util.find_spec("cut_cross_entropy") is not None
    reason = "needs a CUDA device and the tensors are on cpu" if installed else "cut-cross-entropy is not installed"
    with pytest.raises(ConfigError, match=reason) as caught:
        call()
    assert ("kernel='torch'" if installed else "eetrain[cce]") in caught.value.hint
