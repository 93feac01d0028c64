"""repair=propagate: equal to a full-sequence forward in which a token's state passes unchanged by blocks it skips.

``x_l = where(l <= depth, block_l(x_{l-1}), x_{l-1})``, computed by hooks on transformers' own forward.
"""

from __future__ import annotations

import pytest
import torch
from families_support import ALL, close, confidences, drive, mixed, mixing_threshold, multi_exit, sequences
from transformers import DynamicCache

from eetrain.backbones import Harvester, blocks_of
from eetrain.decoding import Threshold
from eetrain.decoding.confidence import MEASURES, Evidence


class Truth:
    """The masked forward: states after every block, keys and values, logits of every head.

    Args:
        depth_BT: how many blocks each slot runs.
    """

    @torch.no_grad()
    def __init__(self, model, data, depth_BT: torch.Tensor) -> None:
        self.model, self.cache, self.states = model, DynamicCache(), {}
        handles = [
            block.register_forward_hook(self._hook(number, depth_BT))
            for number, block in enumerate(blocks_of(model.backbone, model.anatomy), start=1)
        ]
        kwargs = {"past_key_values": self.cache, "use_cache": True, "position_ids": data.positions_BT}
        try:
            self.full = model.causal_lm(data.ids_BT, attention_mask=data.mask_BT, **kwargs).logits
        finally:
            for handle in handles:
                handle.remove()
        harvester = Harvester(model.backbone, model.anatomy)
        harvest = harvester(data.ids_BT, attention_mask=data.mask_BT, position_ids=data.positions_BT)
        norm, shared = model.shared_tail()
        self.logits = {model.num_blocks: self.full}
        for layer in model.exit_layers:
            head = model.head(layer)
            features = head(self.states[layer], model.head_call(layer, harvest), norm)
            self.logits[layer] = head.projection(shared)(features)

    def _hook(self, number: int, depth_BT: torch.Tensor):
        def hook(_module, args, output):
            runs = (depth_BT >= number)[..., None]
            self.states.setdefault(number - 1, args[0])
            self.states[number] = torch.where(runs, output, args[0])
            return self.states[number]

        return hook

    def confidence(self, layer: int, slot: int, measure: str) -> torch.Tensor:
        after, before = self.states[layer][:, slot], self.states[layer - 1][:, slot]
        return MEASURES[measure](Evidence(layer, after, before, lambda: self.logits[layer][:, slot]))


def run_and_truth(family, head, measure="max"):
    model, data = multi_exit(family, head), sequences()
    sure = confidences(model, data, measure)
    threshold = mixing_threshold(sure, model.num_blocks)
    held = CacheCheck(model, data)
    run = drive(model, Threshold(threshold, repair="propagate", measure=measure), data, held)
    depth_BT = torch.full_like(data.ids_BT, model.num_blocks)
    depth_BT[:, data.prompt :] = run.depth_BS[:, 1:]
    return model, data, run, Truth(model, data, depth_BT), threshold, held


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", ["tied", "norm", "mlp", "block"])
def test_logits_decisions_and_cache_equal_the_masked_forward(family, head):
    model, data, run, truth, threshold, held = run_and_truth(family, head)
    assert mixed(run.depth_BS), "no step has rows of unequal depth"
    check_logits(data, run, truth, family)
    check_decisions(model, data, run, truth, threshold, "max")
    held.compare(truth, family)
    assert run.runner.block_calls == int(run.depth_BS[:, 1:].sum())


@pytest.mark.parametrize("measure", ["margin", "entropy", "saturation"])
def test_every_measure(measure):
    model, data, run, truth, threshold, _ = run_and_truth("llama", "norm", measure)
    assert mixed(run.depth_BS)
    check_logits(data, run, truth, "llama")
    check_decisions(model, data, run, truth, threshold, measure)


def check_logits(data, run, truth, family):
    for step in range(run.depth_BS.shape[1]):
        for row in range(len(data.ids_BT)):
            want = truth.logits[int(run.depth_BS[row, step])][row, data.prompt - 1 + step]
            torch.testing.assert_close(run.logits_BSV[row, step], want, **close(family))


def check_decisions(model, data, run, truth, threshold, measure):
    for step in range(1, run.depth_BS.shape[1]):
        for layer in model.exit_layers:
            sure = truth.confidence(layer, data.prompt - 1 + step, measure)
            for row, depth in enumerate(run.depth_BS[:, step].tolist()):
                if layer <= depth:
                    assert (float(sure[row]) > threshold) == (layer == depth)


class CacheCheck:
    """Copies of what the runner says is present, after every step; compared when the truth is known."""

    def __init__(self, model, data) -> None:
        self.model, self.data = model, data
        self.seen: list[tuple[int, int, int, torch.Tensor, torch.Tensor]] = []

    def __call__(self, runner) -> None:
        bounds = runner.route.boundaries
        for row in range(len(runner.ids)):
            lengths = [runner.reached[bound][row] for bound in bounds]
            assert lengths == sorted(lengths, reverse=True), "a deeper block holds more than a shallower one"
            assert lengths[0] == runner.ids.shape[1], "every token runs the first range"
        for block in range(1, self.model.num_blocks + 1):
            bound = min(bound for bound in bounds if bound >= block)
            layer = runner.cache.layers[block - 1]
            for row, present in enumerate(runner.reached[bound]):
                held = (tensor[row, :, :present].clone() for tensor in (layer.keys, layer.values))
                self.seen.append((block, row, present, *held))

    def compare(self, truth, family) -> None:
        for block, row, present, keys, values in self.seen:
            real = self.data.mask_BT[row, :present].bool()
            layer = truth.cache.layers[block - 1]
            for got, full in ((keys, layer.keys), (values, layer.values)):
                torch.testing.assert_close(got[:, real], full[row, :, :present][:, real], **close(family))


def test_the_repairs_differ():
    """Else the tests above could not tell propagation from recomputation."""
    model, data, run, _, threshold, _ = run_and_truth("llama", "norm")
    exact = drive(model, Threshold(threshold, cap=100), data)
    assert not torch.allclose(exact.logits_BSV, run.logits_BSV, atol=1e-3)
