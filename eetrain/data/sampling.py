"""Which rows form which batch, as plain arithmetic: order = f(seed, epoch), position = (epoch, batches
consumed).

Training: a permutation of the rows is cut into global batches of ``batch_size * num_replicas`` rows; replica
`rank` takes the `rank`-th slice of each. The position is *told* to the sampler (`seek`, `load_state_dict`),
never counted while it is iterated, because loader workers draw batches ahead of the training loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TypedDict

import torch
from torch.utils.data import Sampler

from eetrain.errors import ConfigError

FILLER = -1
"""Index of a row that only evens out the batches of the replicas; it carries no labels."""


class SamplerState(TypedDict):
    """Where a run stands in its data, and what must be equal for that position to mean the same rows."""

    epoch: int
    batches: int
    global_batch_size: int
    num_rows: int
    seed: int


def epoch_order(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the permutation of ``range(num_rows)`` that epoch `epoch` uses, int64 of shape [num_rows].

    Seed and epoch are hashed together, so that (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated.
    """
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_rows, generator=generator)


class ResumableBatchSampler(Sampler[list[int]]):
    """Shuffled batches of one replica that can start in the middle of an epoch.

    Args:
        num_rows: rows of the data set, at least 1.
        batch_size: rows per batch and replica.
        num_replicas: how many replicas share the data.
        rank: which of them this is, 0-based.
        seed: of the shuffle.
        shuffle: ``False`` keeps the order of the rows, in every epoch.
        drop_last: drop the rows that do not fill a global batch; otherwise the last one is filled up with the
            first rows of the epoch's order (repeated as often as needed), so that every batch is whole and
            all replicas get equally many.

    Raises:
        ConfigError: with `drop_last` there are too few rows for a single global batch.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        assert min(num_rows, batch_size) > 0
        assert 0 <= rank < num_replicas
        self.num_rows, self.batch_size = num_rows, batch_size
        self.num_replicas, self.rank = num_replicas, rank
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0
        self.start = 0
        if len(self) == 0:
            raise ConfigError(
                f"{num_rows} rows do not fill one batch of {batch_size} rows on {num_replicas} replicas.",
                hint="Lower batch_size or set drop_last: false.",
            )

    @property
    def global_batch_size(self) -> int:
        """Rows per step over all replicas."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Return the batches of a whole epoch, wherever this one starts."""
        whole, rest = divmod(self.num_rows, self.global_batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.num_rows, self.seed, self.epoch) if self.shuffle else torch.arange(self.num_rows)
        for batch in range(self.start, len(self)):
            first = batch * self.global_batch_size + self.rank * self.batch_size
            # The modulo is the wrap: positions past the end repeat the epoch's first rows.
            yield order[torch.arange(first, first + self.batch_size) % self.num_rows].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; a no-op for the present one, whose position may be in its middle."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def seek(self, epoch: int, batches: int) -> None:
        """Let the next iteration start at batch `batches` (0-based) of `epoch`."""
        self.epoch, self.start = epoch, batches

    def state_dict(self) -> SamplerState:
        """Return the position at which iteration starts."""
        return SamplerState(
            epoch=self.epoch,
            batches=self.start,
            global_batch_size=self.global_batch_size,
            num_rows=self.num_rows,
            seed=self.seed,
        )

    def load_state_dict(self, state: SamplerState) -> None:
        """Start where `state` says.

        At the start of an epoch data, seed and batch size may be others than those of the state. In the
        middle of one they may not, as the rest of the epoch would not be the rows not yet seen; only the
        split of a global batch over replicas is free.

        Raises:
            ConfigError: the position lies in the middle of an epoch of other data, seed or global batch size.
        """
        self.seek(state["epoch"], state["batches"])
        mine = self.state_dict()
        for name in ("num_rows", "seed", "global_batch_size"):
            if state["batches"] and state[name] != mine[name]:
                raise ConfigError(
                    f"The checkpoint stands in the middle of an epoch with {name} {state[name]}, this run "
                    f"has {name} {mine[name]}.",
                    hint="Resume with the data settings of the interrupted run, or from a checkpoint of "
                    "an epoch's end.",
                )


class FixedSampler(Sampler[int]):
    """Rows in file order for evaluation, each on exactly one replica.

    Replica `rank` takes rows ``rank, rank + R, rank + 2 R, ...``. All replicas get equally many, or collective
    calls would hang; one that runs out yields `FILLER`, a row without labels, so that nothing is counted twice.

    Args:
        num_rows: rows of the data set.
        num_replicas: how many replicas share the data.
        rank: which of them this is, 0-based.
    """

    def __init__(self, num_rows: int, num_replicas: int = 1, rank: int = 0) -> None:
        assert num_rows > 0
        assert 0 <= rank < num_replicas
        self.num_rows = num_rows
        self.num_replicas, self.rank = num_replicas, rank

    def __len__(self) -> int:
        """Return the rows of each replica, fillers included."""
        return -(-self.num_rows // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        for step in range(len(self)):
            row = step * self.num_replicas + self.rank
            yield row if row < self.num_rows else FILLER
