"""The likelihood of references under a policy, against full forward passes and a loop without a cache."""

import pytest
import torch

from eetrain.data.tokenization import Example
from eetrain.evaluation import Sample, forced_nll, teacher_forced
from eetrain.exits import ExitConfig, GateConfig, MultiExitModel
from eetrain.testing.tiny import tiny_model

LENGTHS = ((5, 4), (2, 7), (8, 1), (3, 4), (1, 2))
"""Tokens of prompts and references."""


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return MultiExitModel(tiny_model("llama"), ExitConfig(layers=[1, 3])).eval()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for prompt, reference in LENGTHS:
        ids = torch.randint(3, 61, (prompt + reference,), generator=draw).tolist()
        scored = [False] * prompt + [True] * reference
        found.append(Sample(tuple(ids[:prompt]), ("text",), (Example(ids, scored, ""), Example([1], [True], ""))))
    return found


def summed(model: MultiExitModel, sample: Sample, layer: int | None) -> float:
    """From one forward pass."""
    example = sample.examples[0]
    with torch.no_grad():
        output = model(torch.tensor([example.ids]))
        log_p = (model.logits(output) if layer is None else model.logits(output, layer))[0].log_softmax(-1)
    return -sum(
        float(log_p[place - 1, token]) for place, token in enumerate(example.ids) if example.scored[place] and place > 0
    )


@pytest.mark.parametrize(
    ("policy", "layer"), [("never", None), ("always:1", 1), ("always:3", 3), ("threshold:2", None), ("static:4", None)]
)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_fixed_depths_equal_one_forward_pass(
    policy: str, layer: int | None, batch_size: int, model: MultiExitModel, samples: list[Sample]
) -> None:
    found = forced_nll(model, policy, samples, batch_size=batch_size)
    assert [score.tokens for score in found] == [reference for _, reference in LENGTHS]
    for score, sample in zip(found, samples, strict=True):
        assert score.nll == pytest.approx(summed(model, sample, layer), rel=1e-9)


def test_sums_per_token_are_those_of_the_table_of_exits(model: MultiExitModel, samples: list[Sample]) -> None:
    rows = teacher_forced(model, [sample.examples[0] for sample in samples])
    for policy, row in zip(("always:1", "always:3", "never"), rows, strict=True):
        found = forced_nll(model, policy, samples)
        tokens = sum(score.tokens for score in found)
        assert tokens == row.tokens
        assert sum(score.nll for score in found) / tokens == pytest.approx(row.nll, rel=1e-9)


def test_threshold_equals_a_forward_pass_a_token(model: MultiExitModel, samples: list[Sample]) -> None:
    """Under recompute deeper blocks see all earlier tokens as the full model does; each token picks its own depth."""
    threshold, picked = 0.0395, []
    found = forced_nll(model, f"threshold:{threshold},cap=100", samples, batch_size=3)
    for score, sample in zip(found, samples, strict=True):
        ids, nll = sample.examples[0].ids, 0.0
        for place in range(len(sample.prompt_ids), len(ids)):
            with torch.no_grad():
                output = model(torch.tensor([ids[:place]]))
                probabilities = {
                    layer: (model.logits(output) if layer is None else model.logits(output, layer))[0, -1].softmax(-1)
                    for layer in (1, 3, None)
                }
            # The prompt runs all blocks, so its last position gives the first token at full depth.
            sure = [layer for layer in (1, 3) if float(probabilities[layer].max()) > threshold]
            layer = sure[0] if sure and place > len(sample.prompt_ids) else None
            picked.append(layer)
            nll -= float(probabilities[layer][ids[place]].log())
        assert score.nll == pytest.approx(nll, rel=1e-9)
    assert set(picked) == {1, 3, None}, "the threshold tells tokens apart"


@pytest.mark.parametrize(
    "policy",
    [
        "threshold:0.0395,cap=2",
        "threshold:0.0395,repair=propagate",
        "static:2",
        "skipdecode:max=4,min=2,length=5",
        "d3:0.8",
    ],
)
def test_a_batch_equals_its_rows_alone(policy: str, model: MultiExitModel, samples: list[Sample]) -> None:
    together = forced_nll(model, policy, samples, batch_size=5)
    alone = forced_nll(model, policy, samples, batch_size=1)
    assert [score.nll for score in together] == pytest.approx([score.nll for score in alone], rel=1e-9)
    full = [score.nll for score in forced_nll(model, "never", samples)]
    assert [score.nll for score in together] != pytest.approx(full, rel=1e-3)


def test_a_batch_under_gates_equals_its_rows_alone(samples: list[Sample]) -> None:
    torch.manual_seed(0)
    gated = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[1, 3], gates=GateConfig(cost_weights=[1.0]))).eval()
    with torch.no_grad():
        for parameter in gated.gates.parameters():
            parameter.copy_(torch.randn_like(parameter))
    policies = [("gate:0.5", 5), ("gate:0.5", 1), ("never", 5)]
    together, alone, full = ([s.nll for s in forced_nll(gated, name, samples, batch_size=n)] for name, n in policies)
    assert together == pytest.approx(alone, rel=1e-9)
    assert together != pytest.approx(full, rel=1e-3), "some token left early"


def test_only_scored_tokens_count_but_all_are_fed(model: MultiExitModel) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    whole = Sample((5,), (), (Example(ids, [False, True, True, False, True, False], ""),))
    [score] = forced_nll(model, "never", [whole])
    assert score.tokens == 3
    assert score.nll == pytest.approx(summed(model, whole, None), rel=1e-9)


def test_rows_without_a_scored_token_give_nothing(model: MultiExitModel, samples: list[Sample]) -> None:
    cut = Sample((5, 6, 7), (), (Example([5, 6], [False, False], ""),))
    counted = []
    found = forced_nll(model, "never", [cut, samples[0], cut], batch_size=2, on_batch=lambda: counted.append(1))
    assert [score.tokens for score in found] == [0, 4, 0]
    assert [score.nll for score in found][::2] == [0, 0]
    assert found[1].nll == pytest.approx(summed(model, samples[0], None), rel=1e-9)
    assert len(counted) == 2


def test_without_a_prompt_the_first_token_is_given(model: MultiExitModel) -> None:
    sample = Sample((), ("x",), (Example([5, 6, 7], [True] * 3, ""),))
    [score] = forced_nll(model, "never", [sample])
    assert score.tokens == 2
    assert score.nll == pytest.approx(summed(model, sample, None), rel=1e-9)
