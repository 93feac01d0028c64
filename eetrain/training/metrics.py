"""Quality of every exit and of the full depth over a data set; sums only, so memory does not grow with it.

Shape suffixes: ``E`` exits, ``N`` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from eetrain.objectives.linear_ce import IGNORE_INDEX
from eetrain.objectives.objective import FULL, depth_name
from eetrain.objectives.token_statistics import TokenStatistics

NUM_BINS = 15


def sum_dtype() -> torch.dtype:
    """float64 wherever the machine has it: Apple's GPUs do not."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


def reset(metric: Metric) -> None:
    """Start again, with states that a later fit may update: evaluation runs in inference mode."""
    with torch.inference_mode(False):
        metric.reset()


class TokenMean(Metric):
    """Mean over tokens, summed over batches and processes."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=sum_dtype()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=sum_dtype()), dist_reduce_fx="sum")

    def update(self, values_N: Tensor) -> None:
        """Add the values of some tokens."""
        self.total += values_N.to(self.total.dtype).sum()
        self.count += values_N.numel()

    def compute(self) -> Tensor:
        """``sum / count``; not a number without tokens."""
        return self.total / self.count


class CalibrationError(Metric):
    """Expected calibration error: ``sum_b (n_b / n) |accuracy_b - confidence_b|`` over equal bins of confidence.

    Guo et al. 2017 (arXiv 1706.04599), equation 3, with torchmetrics' bins (closed on the left). torchmetrics' own
    metric keeps every confidence, and its multi-class form wants the logits; this one keeps three sums a bin.

    Args:
        num_bins: bins of equal width on [0, 1].
    """

    full_state_update = False
    counts: Tensor
    confidences: Tensor
    hits: Tensor

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        super().__init__()
        self.edges = [i / num_bins for i in range(1, num_bins)]
        for name in ("counts", "confidences", "hits"):
            self.add_state(name, torch.zeros(num_bins, dtype=sum_dtype()), dist_reduce_fx="sum")

    def update(self, confidence_N: Tensor, correct_N: Tensor) -> None:
        """Add tokens: the probability of the prediction, and whether it was right."""
        confidence_N = confidence_N.to(self.counts.dtype)
        edges = torch.tensor(self.edges, dtype=confidence_N.dtype, device=confidence_N.device)
        bins_N = torch.bucketize(confidence_N, edges, right=True)
        self.counts.index_add_(0, bins_N, torch.ones_like(confidence_N))
        self.confidences.index_add_(0, bins_N, confidence_N)
        self.hits.index_add_(0, bins_N, correct_N.to(confidence_N.dtype))

    def compute(self) -> Tensor:
        """The error in [0, 1]; not a number without tokens."""
        return (self.hits - self.confidences).abs().sum() / self.counts.sum()


class ExitMetrics(nn.Module):
    """NLL, accuracy, calibration and agreement with the last layer, for every exit and the full depth.

    Args:
        exit_layers: the exits.
        full_depth: whether the last block is there; without it nothing is compared to it.
    """

    def __init__(self, exit_layers: tuple[int, ...], full_depth: bool) -> None:
        super().__init__()
        self.layers = (*exit_layers, FULL) if full_depth else tuple(exit_layers)
        self.full_depth = full_depth
        self.metrics = nn.ModuleDict()
        for layer in self.layers:
            for name in ("nll", "accuracy", "ece", *(["agreement"] if full_depth and layer != FULL else [])):
                metric = CalibrationError() if name == "ece" else TokenMean()
                self.metrics[f"{name}/{depth_name(layer)}"] = metric

    def update(self, statistics: TokenStatistics, layers: tuple[int, ...], labels_N: Tensor) -> None:
        """Add a batch.

        Args:
            statistics: ``[E, N]``.
            layers: the layer of each row.
            labels_N: shifted labels; ignored positions do not count.
        """
        assert layers == self.layers, f"scored {layers}, metrics are of {self.layers}"
        valid = labels_N != IGNORE_INDEX
        labels_N = labels_N[valid]
        last_N = statistics.prediction[-1][valid]
        for row, layer in enumerate(layers):
            depth = depth_name(layer)
            prediction_N = statistics.prediction[row][valid]
            correct_N = prediction_N == labels_N
            self._add(f"nll/{depth}", statistics.nll[row][valid])
            self._add(f"accuracy/{depth}", correct_N)
            self._add(f"ece/{depth}", statistics.max_prob[row][valid], correct_N)
            if f"agreement/{depth}" in self.metrics:
                self._add(f"agreement/{depth}", prediction_N == last_N)

    def _add(self, name: str, *values_N: Tensor) -> None:
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        metric.update(*values_N)

    def compute(self) -> dict[str, Tensor]:
        """All values, ``nll/exit_3`` and so on, over all processes; starts again afterwards."""
        values: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            assert isinstance(metric, Metric)
            values[name] = metric.compute()
            reset(metric)
        return values
