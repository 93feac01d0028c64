"""The last linear map: factor first, then the soft cap."""

from __future__ import annotations

import math

import pytest
import torch

from eetrain.backbones import Projection


@pytest.mark.parametrize("bias", [None, torch.tensor([0.5, -1.0])])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_formula(bias, scale, softcap):
    weight, hidden = torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), torch.tensor([[[0.7, -0.2]]])
    got = Projection(weight, bias, scale, softcap)(hidden).flatten().tolist()
    for index in range(2):
        raw = sum(float(weight[index, k]) * float(hidden[0, 0, k]) for k in range(2))
        raw = scale * (raw + (0.0 if bias is None else float(bias[index])))
        want = raw if softcap is None else softcap * math.tanh(raw / softcap)
        assert got[index] == pytest.approx(want, rel=1e-6)
