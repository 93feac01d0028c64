"""LayerSkip whose draws replicas and one process agree on: they go by the rows themselves."""

import torch
from torch import Tensor

from eetrain.objectives import LayerSkip


class DropsByRow(LayerSkip):
    """Drops what the sum of a row's labels says; some blocks run in no row of a micro-batch, a replica or a batch."""

    def active_blocks(
        self, labels_BT: Tensor, position_ids: Tensor | None = None, *, step: int, training: bool = True
    ) -> Tensor | None:
        """See :class:`LayerSkip`."""
        if not training:
            return None
        row_B = (labels_BT * (labels_BT > 0)).sum(1)
        block_L = torch.arange(self.num_blocks)[:, None]
        runs_LB = (row_B * (block_L + 3) + block_L) % 5 > 1
        runs_LB &= block_L != step % (self.num_blocks + 1)
        return runs_LB[..., None].expand(-1, -1, labels_BT.shape[1])
