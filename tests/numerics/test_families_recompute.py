"""repair=recompute: emitted logits are those of a teacher-forced forward, and the cache that of a full forward."""

from __future__ import annotations

import pytest
import torch
from families_support import (
    ALL,
    Sequences,
    close,
    confidences,
    drive,
    emitted,
    expected_depths,
    full_cache,
    mixed,
    mixing_threshold,
    multi_exit,
    sequences,
    teacher_forced,
)

from eetrain import ExitConfig, MultiExitModel
from eetrain.decoding import Threshold
from eetrain.decoding.confidence import MEASURES
from eetrain.testing.tiny import tiny_model

HEADS = ("tied", "norm", "mlp", "block")


def check(family: str, head: str, cap: int, measure: str = "max", quantile: float = 0.6) -> torch.Tensor:
    """Run with a threshold that mixes depths, compare decisions and logits; return the depths."""
    model, data = multi_exit(family, head), sequences()
    sure = confidences(model, data, measure)
    threshold = mixing_threshold(sure, 4, cap, quantile)
    run = drive(model, Threshold(threshold, cap=cap, measure=measure), data)
    assert run.depth_BS.tolist() == expected_depths(sure, threshold, 4, cap).tolist()
    assert mixed(run.depth_BS), "no step has rows of unequal depth: the test would show nothing"
    want = emitted(teacher_forced(model, data), run.depth_BS)
    torch.testing.assert_close(run.logits_BSV, want, **close(family))
    waiting = run.depth_BS[:, 1:].flip(1).cummax(1).values  # a token runs as deep as the deepest one from it on
    assert run.runner.block_calls == int(waiting.sum())
    return run.depth_BS


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("cap", [1, 3, 100])
def test_emitted_logits_are_the_teacher_forced_ones(family, head, cap):
    depth = check(family, head, cap)
    if cap == 1:
        early = depth[:, 1:] < 4
        assert not (early[:, 1:] & early[:, :-1]).any(), "two early tokens in a row"
        assert early.any()


@pytest.mark.parametrize("measure", sorted(MEASURES))
@pytest.mark.parametrize("cap", [1, 3, 100])
def test_every_measure_decides_by_its_formula(measure, cap):
    check("llama", "norm", cap, measure)


@pytest.mark.parametrize("quantile", [0.1, 0.3, 0.8, 0.9])
def test_many_and_few_early_tokens(quantile):
    check("qwen2", "block", 100, quantile=quantile)


def real(data: Sequences, stop: int) -> torch.Tensor:
    return data.mask_BT[:, :stop].bool()


class CacheCheck:
    """After each step: what the runner says is present equals the full forward's, and the lengths make sense."""

    def __init__(self, model, data: Sequences, tolerance: dict[str, float]) -> None:
        self.model, self.data, self.tolerance = model, data, tolerance
        self.truth = full_cache(model, data)
        self.ragged = 0

    def __call__(self, runner) -> None:
        slots = runner.ids.shape[1]
        bounds = runner.route.boundaries
        for row in range(len(runner.ids)):
            lengths = [runner.reached[bound][row] for bound in bounds]
            assert lengths == sorted(lengths, reverse=True), "a deeper block holds more than a shallower one"
            assert lengths[0] == slots, "every token runs the first range"
            self.ragged += lengths[-1] < slots
        for block in range(1, self.model.num_blocks + 1):
            bound = min(bound for bound in bounds if bound >= block)
            mine, theirs = runner.cache.layers[block - 1], self.truth.layers[block - 1]
            for row in range(len(runner.ids)):
                present = runner.reached[bound][row]
                keep = self.data.mask_BT[row, :present].bool()
                for ours, full in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    got, want = ours[row, :, :present][:, keep], full[row, :, :present][:, keep]
                    assert want.abs().sum() > 0
                    torch.testing.assert_close(got, want, **self.tolerance)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("cap", [2, 100])
def test_cache_after_every_step_is_that_of_one_full_forward(family, cap):
    model, data = multi_exit(family), sequences()
    sure = confidences(model, data)
    threshold = mixing_threshold(sure, 4, start=0.5)
    compare = CacheCheck(model, data, close(family))
    run = drive(model, Threshold(threshold, cap=cap), data, compare)
    assert compare.ragged > 3, "no step left keys and values missing: the test would show nothing"
    if cap == 2:
        assert all(data.ids_BT.shape[1] - length <= 2 for length in run.runner.reached[4])


@pytest.mark.parametrize("family", ALL)
def test_without_exits_the_cache_is_whole_after_every_step(family):
    model, data = multi_exit(family), sequences()
    compare = CacheCheck(model, data, close(family))
    run = drive(model, Threshold(2.0), data, compare)
    assert compare.ragged == 0
    assert run.depth_BS.unique().tolist() == [4]
    assert run.runner.block_calls == 3 * data.steps * 4


def test_prompts_and_tokens_far_beyond_the_window_and_the_first_buffers():
    """100 tokens: buffers grow, windows of 8 slide on, waiting states outlive their first buffer."""
    for family in ("gemma3_text", "mistral"):
        model = MultiExitModel(tiny_model(family, max_position_embeddings=256), ExitConfig(layers=[1, 3], head="block"))
        data = sequences(lengths=(3, 2), steps=100)
        sure = confidences(model, data)
        threshold = mixing_threshold(sure, 4, start=0.5)
        run = drive(model, Threshold(threshold, cap=20), data)
        assert run.depth_BS.tolist() == expected_depths(sure, threshold, 4, 20).tolist()
        want = emitted(teacher_forced(model, data), run.depth_BS)
        torch.testing.assert_close(run.logits_BSV, want, rtol=0, atol=1e-10)
