"""The chunked loss under DistributedDataParallel on two gloo processes."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eetrain.backbones.projection import Projection
from eetrain.objectives.linear_ce import linear_cross_entropy


class TwoExits(nn.Module):
    """Two layers whose states share one output matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.matrix = nn.Parameter(torch.randn(9, 4))

    def forward(self, inputs, labels):
        early = self.first(inputs).tanh()
        head = Projection(self.matrix)
        return linear_cross_entropy(
            [early, self.second(early)], [head, head], labels, exit_weights=[0.3, 1.0], chunk_size=3
        ).loss


def batch(rank):
    generator = torch.Generator().manual_seed(rank + 1)
    return torch.randn(8, 4, generator=generator), torch.randint(0, 9, (8,), generator=generator)


def run(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    model = TwoExits()
    parallel = DistributedDataParallel(model)
    parallel(*batch(rank)).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/grads{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_are_averaged_over_ranks(tmp_path: Path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    model = TwoExits()
    ((model(*batch(0)) + model(*batch(1))) / 2).backward()
    for rank in range(2):
        for grad, parameter in zip(torch.load(tmp_path / f"grads{rank}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-6, atol=1e-7)
