"""What the gates of every cost weight would do over a data set: depth, quality, and exits that are out of use.

Shape suffixes: ``N`` tokens, ``K`` cost weights, ``E`` depths (exits ascending, then the full depth), ``G = E - 1``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from eetrain.exits.gates import cost_name
from eetrain.exits.gating import chosen_exit
from eetrain.objectives.linear_ce import IGNORE_INDEX
from eetrain.objectives.objective import FULL, depth_name
from eetrain.objectives.token_statistics import TokenStatistics
from eetrain.training.metrics import sum_dtype

GATE_PREFIX = "gate/"
FEWEST, MOST = 0.005, 0.995


class GateMetrics(Metric):
    """Teacher-forced use of exits with the rule ``g >= 0.5``, for every cost weight.

    A token leaves at the first exit whose gate says so. Every depth sees the tokens as the full model left them, so a
    decoder that skips blocks differs by what its repaired keys and values change.

    Args:
        exit_layers: exits with gates, ascending.
        num_blocks: of the backbone.
        cost_weights: of the gates.
    """

    full_state_update = False
    counts: Tensor
    nll: Tensor
    hits: Tensor

    def __init__(self, exit_layers: Sequence[int], num_blocks: int, cost_weights: Sequence[float]) -> None:
        super().__init__()
        self.layers = (*exit_layers, FULL)
        self.blocks = [*exit_layers, num_blocks]
        self.names = [cost_name(weight) for weight in cost_weights]
        size = len(self.names)
        for name, shape in (("counts", (size, len(self.layers))), ("nll", (size,)), ("hits", (size,))):
            self.add_state(name, torch.zeros(shape, dtype=sum_dtype()), dist_reduce_fx="sum")

    def update(self, logits_NKG: Tensor, statistics: TokenStatistics, layers: Sequence[int], labels_N: Tensor) -> None:
        """Add a batch.

        Args:
            logits_NKG: gate logits of the tokens with a label.
            statistics: of all tokens at all depths.
            layers: the layer of each row of ``statistics``.
            labels_N: shifted labels; ignored positions do not count.
        """
        valid = labels_N != IGNORE_INDEX
        rows = torch.tensor([list(layers).index(layer) for layer in self.layers], device=labels_N.device)
        nll_EN = statistics.nll[rows][:, valid].to(self.nll.dtype)
        hits_EN = (statistics.prediction[rows][:, valid] == labels_N[valid]).to(self.nll.dtype)
        chosen_KN = chosen_exit(logits_NKG >= 0).t()
        self.counts += torch.stack([(chosen_KN == place).sum(-1) for place in range(len(self.layers))], -1)
        self.nll += nll_EN.gather(0, chosen_KN).sum(-1)
        self.hits += hits_EN.gather(0, chosen_KN).sum(-1)

    def compute(self) -> dict[str, Tensor]:
        """``gate/0.3/share/exit_3``, ``.../depth``, ``.../nll`` and ``.../accuracy``; not numbers without tokens."""
        total_K = self.counts.sum(-1)
        shares_KE = self.counts / total_K[:, None]
        depth_K = (shares_KE * shares_KE.new_tensor(self.blocks)).sum(-1)
        values: dict[str, Tensor] = {}
        for k, name in enumerate(self.names):
            of_gate = {"depth": depth_K[k], "nll": self.nll[k] / total_K[k], "accuracy": self.hits[k] / total_K[k]}
            of_gate |= {f"share/{depth_name(layer)}": shares_KE[k, e] for e, layer in enumerate(self.layers)}
            values |= {f"{GATE_PREFIX}{name}/{quantity}": value for quantity, value in of_gate.items()}
        return values


def collapsed(scores: Mapping[str, float]) -> list[str]:
    """A phrase for every exit that takes almost no or almost all tokens; the full depth has no gate and is not meant.

    Args:
        scores: as :class:`GateMetrics` names them; others are passed over.
    """
    found = []
    for name, share in scores.items():
        if name.startswith(GATE_PREFIX) and "/share/exit_" in name and not FEWEST <= share <= MOST:
            _, weight, _, depth = name.split("/")
            found.append(f"cost weight {weight}: {depth} takes {share:.1%} of the tokens")
    return found
