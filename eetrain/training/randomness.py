"""Dropout and other noise of training as a function of seed, rank and batch, so that a resumed run needs no state."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def batch_seed(seed: int, rank: int, batch: int) -> int:
    """A 63-bit number that differs for every batch of every process.

    Args:
        seed: of the run.
        rank: of the process.
        batch: training batches that came before, over all epochs.
    """
    digest = hashlib.sha256(f"{seed}/{rank}/{batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_generators(seed: int) -> None:
    """Set the global generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
