"""What the chunked loss allocates, seen by recording every tensor that torch creates."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eetrain.backbones.projection import Projection
from eetrain.exits import Gate, GateConfig
from eetrain.objectives import JointGating, linear_ce
from eetrain.objectives.linear_ce import linear_cross_entropy
from eetrain.objectives.teacher import Distillation, Teacher


class Recorder(TorchDispatchMode):
    """Sizes of all storages made under the mode, and how much of them lives at the same time.

    Args:
        watched: number of bytes of the storages to count one by one.
    """

    def __init__(self, watched: int) -> None:
        super().__init__()
        self.watched = watched
        self.largest = self.live = self.peak = 0
        self.watched_live = self.watched_peak = self.watched_made = 0
        self._seen: dict[int, object] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in self._tensors((args, kwargs)):
            self._seen.setdefault(tensor.untyped_storage()._cdata, None)
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                self._made(storage.nbytes())
        return result

    @staticmethod
    def _tensors(tree):
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def _made(self, size):
        self.largest = max(self.largest, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        if size == self.watched:
            self.watched_made += 1
            self.watched_live += 1
            self.watched_peak = max(self.watched_peak, self.watched_live)

    def _freed(self, key, size):
        del self._seen[key]
        self.live -= size
        if size == self.watched:
            self.watched_live -= 1


def record(
    num_exits, *, vocabulary, width, tokens, chunk, level="none", softcap=None, valid=None, how=None, among=False
):
    """Of a call with tied exits; with ``how`` they learn from a teacher, which may be ``among`` them."""
    torch.manual_seed(0)
    head = Projection(torch.randn(vocabulary, width, requires_grad=True), softcap=softcap)
    hidden = [torch.randn(tokens, width, requires_grad=True) for _ in range(num_exits)]
    labels = torch.randint(0, vocabulary, (tokens,))
    if valid is not None:
        labels[valid:] = -100
    teacher = None
    if how is not None:
        states = hidden[-1] if among else torch.randn(tokens, width)
        teacher = Teacher(states, head, how, num_exits - 1 if among else None)
    with Recorder(chunk * vocabulary * 4) as recorder:
        out = linear_cross_entropy(
            hidden,
            [head] * num_exits,
            labels,
            exit_weights=[1.0] * num_exits,
            statistics=level,
            chunk_size=chunk,
            teacher=teacher,
        )
        out.loss.backward()
    assert head.weight.grad is not None
    return recorder


def test_the_recorder_sees_what_a_plain_loss_allocates():
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Recorder(64 * 1000 * 4) as recorder:
        losses = [
            torch.nn.functional.cross_entropy(hidden @ weight.t(), torch.zeros(64, dtype=torch.int64)) for _ in range(4)
        ]
        sum(losses).backward()
    assert recorder.watched_peak >= 4
    assert recorder.live < recorder.peak


@pytest.mark.parametrize("level", ["none", "all"])
def test_one_chunk_of_logits_of_one_exit_lives_at_a_time(level):
    vocabulary, width, tokens, chunk = 4096, 16, 64, 8
    recorder = record(4, vocabulary=vocabulary, width=width, tokens=tokens, chunk=chunk, level=level)
    assert recorder.watched_made == 4 * tokens // chunk
    assert recorder.watched_peak == 1
    assert recorder.largest == max(chunk, width) * vocabulary * 4


def test_a_soft_cap_keeps_one_more_buffer_for_its_slope():
    recorder = record(3, vocabulary=4096, width=16, tokens=64, chunk=8, softcap=3.0)
    assert recorder.watched_peak == 2
    assert recorder.largest == 16 * 4096 * 4


def test_ignored_positions_are_not_projected():
    recorder = record(2, vocabulary=4096, width=16, tokens=64, chunk=8, valid=24)
    assert recorder.watched_made == 2 * 24 // 8


def test_four_tied_exits_need_no_more_memory_than_one():
    sizes = {"vocabulary": 128_000, "width": 16, "tokens": 64, "chunk": 16}
    one, four = record(1, **sizes).peak, record(4, **sizes).peak
    logits = gradient = 128_000 * 16 * 4
    assert one >= logits + gradient
    assert four <= 1.10 * one
    assert four <= 1.10 * (logits + gradient)


SIZES = {"vocabulary": 4096, "width": 16, "tokens": 64, "chunk": 8}


def test_a_teacher_is_one_more_chunk_and_one_more_product():
    recorder = record(4, **SIZES, how=Distillation(0.5))
    assert recorder.watched_peak == 2
    assert recorder.watched_made == (4 + 1) * 64 // 8
    assert recorder.largest == 16 * 4096 * 4


def test_a_teacher_among_the_exits_has_its_logits_computed_once():
    recorder = record(4, **SIZES, how=Distillation(0.5), among=True)
    assert recorder.watched_peak == 2
    assert recorder.watched_made == 4 * 64 // 8
    assert recorder.largest == 16 * 4096 * 4


def test_of_a_teacher_outside_only_the_kept_tokens_stay():
    recorder = record(4, **SIZES, how=Distillation(0.5, top_k=8))
    assert recorder.watched_peak == 1
    assert recorder.watched_made == (4 + 1) * 64 // 8


def test_four_exits_with_a_teacher_need_no_more_memory_than_one():
    sizes = {"vocabulary": 128_000, "width": 16, "tokens": 64, "chunk": 16}
    one, four = (record(exits, **sizes, how=Distillation()).peak for exits in (1, 4))
    logits = gradient = 128_000 * 16 * 4
    assert four <= 1.10 * one
    assert 2 * logits + gradient <= four <= 1.15 * (2 * logits + gradient)


@dataclass(frozen=True)
class Features:
    features: dict
    full_features: torch.Tensor
    projections: dict
    full_projection: Projection
    router_loss: None
    gates: dict


@pytest.mark.parametrize(("step", "phase"), [(0, "warmup"), (1, "gates"), (2, "exits")])
def test_joint_gating_keeps_one_chunk_of_logits_in_every_phase(monkeypatch, step, phase):
    vocabulary, width, tokens, chunk, layers = 4096, 16, 65, 8, (1, 2, 3)
    monkeypatch.setattr(linear_ce, "_default_chunk", lambda weight: chunk)
    torch.manual_seed(0)
    head = Projection(torch.randn(vocabulary, width, requires_grad=True))
    states = {layer: torch.randn(1, tokens, width, requires_grad=True) for layer in (*layers, 0)}
    config = GateConfig([0.1, 1.0, 10.0], position_length=10)
    gates = {layer: Gate(config) for layer in layers}
    inputs = Features(
        {layer: states[layer] for layer in layers}, states[0], dict.fromkeys(layers, head), head, None, gates
    )
    objective = JointGating(warmup_steps=1, phase_steps=1)
    objective.bind(layers, 4)
    objective.bind_gates(config.cost_weights)
    labels = torch.randint(0, vocabulary, (1, tokens))
    assert objective.phase(step) == phase
    with Recorder(chunk * vocabulary * 4) as recorder:
        objective(inputs, labels, step=step).total.backward()
    assert recorder.watched_made == 4 * (tokens - 1) // chunk
    assert recorder.watched_peak == 1
    assert recorder.largest == (chunk if phase == "gates" else width) * vocabulary * 4
