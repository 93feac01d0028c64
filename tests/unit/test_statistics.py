"""Pearson's test against known values."""

import pytest
import torch

from eetrain.testing.statistics import chi_square_p


def test_known_values():
    """Critical values of the tables: 3.841 at 1 degree of freedom and 11.070 at 5 are the 5 % points."""
    for freedom, critical in ((1, 3.841459), (5, 11.070498)):
        expected = torch.full((freedom + 1,), 1000.0, dtype=torch.float64)
        shift = (critical * 1000 / 2) ** 0.5
        observed = expected.clone()
        observed[0] += shift
        observed[1] -= shift
        assert chi_square_p(observed, expected) == pytest.approx(0.05, abs=1e-6)


def test_what_cannot_be_observed():
    assert chi_square_p(torch.tensor([9, 1]), torch.tensor([10.0, 0.0])) == 0.0
    assert chi_square_p(torch.tensor([10, 0]), torch.tensor([10.0, 0.0])) == 1.0
