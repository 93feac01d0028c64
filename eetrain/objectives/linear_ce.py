"""Cross-entropy of many exits straight from hidden states: logits live for one chunk of one exit.

With ``E`` exits, ``N`` tokens and vocabulary ``V`` the plain way keeps ``E * N * V`` logits until backward.
Here tokens are taken in chunks; each chunk's logits become a loss, statistics and gradients, and are dropped.
Fused linear cross-entropy in Liger-Kernel computes gradients in the forward pass in the same manner; what
differs is that all exits share the pass, so a tied matrix has one gradient buffer, that ignored positions
are never projected, and that token weights may depend on the exit's own confidence.

Shape suffixes: ``B`` batch, ``T`` time, ``E`` exits, ``N`` tokens, ``C`` tokens of one chunk,
``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eetrain.backbones.projection import Projection
from eetrain.errors import ConfigError
from eetrain.objectives import cut_kernel
from eetrain.objectives.chunk_logits import Reading, cast_for_products, read
from eetrain.objectives.gradients import GradientStore, wide_dtype
from eetrain.objectives.teacher import Targets, Teacher
from eetrain.objectives.token_statistics import StatisticsLevel, TokenStatistics

Kernel = Literal["torch", "cce"]
TokenWeights = Callable[[TokenStatistics, int, slice | Tensor], Tensor]
"""Statistics ``[C]`` of one chunk of one exit, the exit's place in the list, the chunk's positions -> ``u`` ``[C]``."""
IGNORE_INDEX = -100
_LOGITS_PER_CHUNK_CPU = 2**22
_LOGITS_PER_CHUNK_ACCELERATOR = 2**27
_FEWEST_ROWS = 64


@dataclass(frozen=True)
class LinearCEOutput:
    """Result of :func:`linear_cross_entropy`.

    Args:
        loss: ``sum_e w_e sum_n u_en CE_en / normalizer``, a scalar to call ``backward`` on.
        exit_losses: ``[E]``, detached: plain mean cross-entropy of each exit over the valid tokens,
            without ``w``, ``u`` or the normalizer.
        statistics: ``[E, N]`` statistics, or ``None`` if none were asked for.
        num_tokens: how many labels were valid, int64 scalar.
        divergences: ``[E]``, detached: mean ``KL(p_T || p_e)`` of each exit over the valid tokens, 0 for the teacher
            itself; ``None`` without one.
    """

    loss: Tensor
    exit_losses: Tensor
    statistics: TokenStatistics | None
    num_tokens: Tensor
    divergences: Tensor | None = None


def shift_labels(labels_BT: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels ``[B * T]`` of the *next* token at every position, from labels aligned with the input ids.

    The last position of a row has no next token and is ignored. Hidden states stay where they are:
    ``features_BTD.flatten(0, 1)`` is a view, and the pairs equal those of transformers' causal LM loss.
    """
    return F.pad(labels_BT[:, 1:], (0, 1), value=ignore_index).reshape(-1)


def linear_cross_entropy(
    hidden: Sequence[Tensor],
    projections: Sequence[Projection],
    labels: Tensor,
    *,
    exit_weights: Sequence[float] | Tensor,
    token_weights: TokenWeights | Tensor | None = None,
    statistics: StatisticsLevel = "none",
    normalizer: Tensor | float | None = None,
    chunk_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    kernel: Kernel = "torch",
    teacher: Teacher | None = None,
) -> LinearCEOutput:
    """Weighted next-token cross-entropy of ``E`` exits without ever holding their logits.

    The matrix products run in the precision of the matrix (under ``torch.autocast`` in autocast's), scale,
    soft cap, softmax and loss in float32 (float64 for float64). Peak memory beside inputs and gradients is
    one chunk of logits of one exit; a soft cap keeps a second one for its slope, a teacher one of its own
    distribution (and slope, if it is among the exits). Ignored positions are not projected. Gradients can be
    fetched once: a second backward or a second derivative raises RuntimeError.

    Args:
        hidden: one ``[N, D]`` tensor per exit, normed.
        projections: one per exit; exits with the same ``weight`` object share one gradient buffer.
        labels: ``[N]``, already shifted (:func:`shift_labels`).
        exit_weights: ``w_e``, one number per exit, constant. At 0 an exit is only measured.
        token_weights: ``u_en``: a tensor that broadcasts to ``[E, N]``, or a :data:`TokenWeights` function. It is
            called for the exits of a chunk in their order, a teacher among them last, before the next chunk starts, so
            that it can tell an exit's weights from what it saw at the exits before. No gradient flows through it.
        statistics: ``"basic"`` (loss, prediction, confidence) or ``"all"`` (margin and entropies as well).
            A function as ``token_weights`` sees at least the basic ones.
        normalizer: divisor of the loss; the number of valid labels if ``None``.
        chunk_size: tokens per chunk; by default as many as keep a chunk near 2^22 logits on a CPU
            and 2^27 on an accelerator.
        ignore_index: label of positions without loss.
        kernel: ``"cce"`` runs the cut-cross-entropy kernels on a GPU instead.
        teacher: makes the loss of every other exit's token ``(1 - a) CE(label) + a CE(p_T, p_e)``, with ``p_T`` and the
            share ``a`` of the teacher; see :class:`eetrain.objectives.teacher.Distillation`. The gradient of the raw
            logits is ``p_e - (1 - a) onehot - a p_T``.

    Raises:
        ConfigError: the numbers of exits disagree, ``chunk_size`` is not positive, or the kernel cannot
            do what is asked.
    """
    weights = _as_floats(exit_weights)
    if not len(hidden) == len(projections) == len(weights) > 0:
        raise ConfigError(
            f"linear_cross_entropy got {len(hidden)} hidden states, {len(projections)} projections and "
            f"{len(weights)} exit weights.",
            hint="pass one of each per exit, and at least one exit.",
        )
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk_size is {chunk_size}.", hint="use a positive number of tokens, or None.")
    if kernel not in ("torch", "cce"):
        raise ConfigError(f"kernel is {kernel!r}.", hint="use 'torch' or 'cce'.")
    valid = labels != ignore_index
    count = valid.sum()
    divisor = _divisor(normalizer, count, wide_dtype(hidden[0].dtype))
    if kernel == "cce":
        cut_kernel.require_usable(hidden, projections, token_weights, statistics, distils=teacher is not None)
        loss, sums_E = cut_kernel.losses(hidden, projections, labels, weights, token_weights, ignore_index)
        return LinearCEOutput(loss / divisor, sums_E / count.clamp(min=1), None, count)
    run = _Run(hidden, projections, labels, weights, token_weights, statistics, ignore_index, teacher)
    with torch.no_grad(), torch.autocast(hidden[0].device.type, enabled=False):
        for rows_C in _chunks(valid, chunk_size or _default_chunk(projections[0].weight)):
            run.add_chunk(rows_C)
    loss = run.store.attach(run.loss / divisor, divisor)
    divergences_E = None if teacher is None else run.divergences_E / count.clamp(min=1)
    return LinearCEOutput(loss, run.sums_E / count.clamp(min=1), run.statistics, count, divergences_E)


class _Run:
    """One pass over all chunks and exits, with the sums it builds up."""

    def __init__(
        self,
        hidden: Sequence[Tensor],
        projections: Sequence[Projection],
        labels: Tensor,
        weights: Sequence[float],
        token_weights: TokenWeights | Tensor | None,
        level: StatisticsLevel,
        ignore_index: int,
        teacher: Teacher | None,
    ) -> None:
        shape = (len(hidden), len(labels))
        self.hidden, self.projections, self.labels, self.weights = hidden, projections, labels, weights
        self.weigh: TokenWeights | None = None
        self.weights_EN: Tensor | None = None
        if isinstance(token_weights, Tensor):
            self.weights_EN = token_weights.detach().expand(shape)
        else:
            self.weigh = token_weights
        self.level: StatisticsLevel = "basic" if level == "none" and self.weigh else level
        self.teacher = teacher
        self.store = GradientStore(hidden, projections)
        self.matrices = cast_for_products([*projections, *([] if teacher is None else [teacher.projection])])
        self.sums_E = torch.zeros(len(hidden), dtype=wide_dtype(hidden[0].dtype), device=labels.device)
        self.divergences_E = torch.zeros_like(self.sums_E)
        self.loss = self.sums_E.new_zeros(())
        self.statistics: TokenStatistics | None = None
        if level != "none":
            self.statistics = TokenStatistics.blank(shape, level, ignore_index=ignore_index, like=self.sums_E)

    def add_chunk(self, rows_C: slice | Tensor) -> None:
        """Account for the tokens ``rows_C`` at every exit, one exit's logits at a time beside the teacher's."""
        labels_C, own = self.labels[rows_C], None if self.teacher is None else self.teacher.place
        reading = None if own is None else self._read(own, rows_C, labels_C, None)
        targets = None if self.teacher is None else self._targets(self.teacher, reading, rows_C, labels_C)
        for index in range(len(self.hidden)):
            if index != own:
                self._add(index, self._read(index, rows_C, labels_C, targets), rows_C, labels_C)
        if own is not None and reading is not None:
            # Last, as its gradient takes the place of what the others learn from.
            self._add(own, reading, rows_C, labels_C)

    def _read(self, index: int, rows_C: slice | Tensor, labels_C: Tensor, targets: Targets | None) -> Reading:
        head = self.projections[index]
        return read(
            self.hidden[index][rows_C],
            self.matrices[id(head.weight)],
            head,
            labels_C,
            level=self.level,
            keep_slope=self._trains(index),
            targets=targets,
        )

    def _targets(self, teacher: Teacher, reading: Reading | None, rows_C: slice | Tensor, labels_C: Tensor) -> Targets:
        """What the teacher says of a chunk; its ``reading`` as a depth of the call is normalised and goes on."""
        if reading is None:
            head = teacher.projection
            reading = read(teacher.hidden[rows_C], self.matrices[id(head.weight)], head, labels_C)
        targets = Targets.take_(reading.exp_CV, reading.sum_C1, teacher.distillation)
        reading.sum_C1 = torch.ones_like(reading.sum_C1)
        return targets

    def _add(self, index: int, reading: Reading, rows_C: slice | Tensor, labels_C: Tensor) -> None:
        weight, weight_C = self.weights[index], self._token_weights(index, rows_C, reading.statistics)
        self.sums_E[index] += reading.nll_C.sum()
        if reading.targets is not None and reading.gap_C is not None:
            self.divergences_E[index] += reading.targets.divergence(reading.nll_C, reading.gap_C).sum()
        if weight != 0:
            weighted_C = reading.loss_C if weight_C is None else reading.loss_C * weight_C
            self.loss += weight * weighted_C.sum()
        if self.statistics is not None and reading.statistics is not None:
            self.statistics.write(index, rows_C, reading.statistics)
        if self._trains(index):
            head = self.projections[index]
            factor = weight * head.scale
            factor_C = torch.full_like(reading.nll_C, factor) if weight_C is None else weight_C * factor
            grad_CV = reading.gradient_(labels_C, factor_C)
            self.store.add(index, rows_C, head, reading.matrix_VD, reading.states_CD, grad_CV)

    def _trains(self, index: int) -> bool:
        return self.weights[index] != 0 and self.store.wanted_by(index, self.projections[index])

    def _token_weights(self, index: int, rows_C: slice | Tensor, statistics: TokenStatistics | None) -> Tensor | None:
        if self.weights_EN is not None:
            return self.weights_EN[index, rows_C].to(self.sums_E.dtype)
        if self.weigh is None:
            return None
        assert statistics is not None
        return self.weigh(statistics, index, rows_C).detach().to(self.sums_E.dtype)


def _chunks(valid_N: Tensor, size: int) -> list[slice | Tensor]:
    """Positions of the valid tokens, ``size`` at a time; slices, which copy nothing, if all are valid."""
    positions = valid_N.nonzero().squeeze(-1)
    if len(positions) == len(valid_N):
        return [slice(start, start + size) for start in range(0, len(valid_N), size)]
    return list(torch.split(positions, size)) if len(positions) else []


def _default_chunk(weight_VD: Tensor) -> int:
    on_cpu = weight_VD.device.type == "cpu"
    budget = _LOGITS_PER_CHUNK_CPU if on_cpu else _LOGITS_PER_CHUNK_ACCELERATOR
    return max(_FEWEST_ROWS, 1 << round(math.log2(budget / weight_VD.shape[0])))


def _as_floats(exit_weights: Sequence[float] | Tensor) -> list[float]:
    values = exit_weights.tolist() if isinstance(exit_weights, Tensor) else exit_weights
    return [float(value) for value in values]


def _divisor(normalizer: Tensor | float | None, count: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss's divisor as a detached scalar; 1 where it would be 0, so that empty batches give 0."""
    value = count if normalizer is None else torch.as_tensor(normalizer, device=count.device)
    value = value.detach().to(dtype)
    return torch.where(value == 0, torch.ones_like(value), value)
