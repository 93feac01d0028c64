"""Bytes kept for backward, against what autograd saves of the same blocks on a CPU."""

import pytest
import torch
from hollow_support import GROUPED, LENGTH, handed_to, hollow, storages
from torch import Tensor

from eetrain.backbones import Harvester
from eetrain.errors import UnsupportedModelError
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.planning.activations import PieceActivations, saved_activations
from eetrain.planning.costs import piece_costs
from eetrain.testing.tiny import FAMILIES, tiny_model

# Masks of a window are turned into numbers by the CPU's kernel; offsets of four experts are not the meta device's.
KERNELS_OWN = {
    "mistral": 4 * LENGTH * LENGTH,
    "gemma3_text": 4 * LENGTH * LENGTH,
    "mixtral": 4 * 4,
    "qwen3_moe": 4 * 4,
}


def counted(model: MultiExitModel) -> tuple[PieceActivations, ...]:
    return saved_activations(model, piece_costs(model, LENGTH), LENGTH)


def saved_by_block(model: MultiExitModel, layer: int) -> tuple[int, bool]:
    harvester = Harvester(model.backbone, model.anatomy)
    harvest = harvester(torch.ones(1, LENGTH, dtype=torch.long))
    hidden = harvest.hidden_BTD.detach().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda t: t):
        harvester.run(harvest, hidden, [layer])
    handed = handed_to(model, harvest)
    own = {key: size for key, size in storages(saved).items() if key not in handed}
    keeps_input = own.pop(hidden.untyped_storage()._cdata, None) is not None
    return sum(own.values()), keeps_input


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_keep_what_autograd_saves(family):
    found = counted(hollow(family))
    real = MultiExitModel(
        tiny_model(family, dtype=torch.float32, **GROUPED.get(family, {})).train(), ExitConfig([1, 3])
    )
    own, keeps_input = saved_by_block(real, 1)
    assert (found[1].own + KERNELS_OWN.get(family, 0), found[1].keeps_input) == (own, keeps_input)
    assert found[0] == PieceActivations(0, False)
    plain = [piece for piece in found if not piece.vocabulary]
    assert len(plain) == 1 + 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "olmo2"])
def test_sixteen_bits_with_norms_in_float32(family):
    found = counted(hollow(family, dtype=torch.bfloat16))
    real = MultiExitModel(tiny_model(family, dtype=torch.bfloat16).train(), ExitConfig([1, 3]))
    assert (found[1].own, found[1].keeps_input) == saved_by_block(real, 1)


def test_eager_attention_keeps_its_scores():
    flash, eager = (counted(hollow("llama", attn_implementation=kind))[1].own for kind in ("sdpa", "eager"))
    heads, width = 4, 32
    # Scores after softmax; keys and values once for every head instead of every second one; flash attention's output is
    # the input of the next matrix, so that only its number for each query is its own.
    scores, repeated, numbers = heads * LENGTH * LENGTH, 2 * LENGTH * width // 2, heads * LENGTH
    assert eager - flash == 4 * (scores + repeated - numbers)


def test_what_is_not_trained_keeps_nothing():
    model = hollow("llama", head="block")
    model.backbone.requires_grad_(False)
    found = counted(model)
    assert [piece.own > 0 for piece in found] == [False, False, True, False, False, True, False, False]
    assert found[-1] == PieceActivations(0, False)
    deep = hollow("llama")
    short = saved_activations(deep, piece_costs(deep, LENGTH, full_depth=False), LENGTH)
    assert short[-2:] == (PieceActivations(0, False),) * 2, "block 4 and the tail have no loss"
    assert short[:-2] == counted(deep)[:-2]


def test_losses_hold_logits_and_the_gradient_of_their_matrix():
    tail = counted(hollow("llama"))[-1]
    assert (tail.vocabulary, tail.logit_bytes, tail.matrix_gradient) == (61, 4, 61 * 32 * 4)
    norm_keeps = 4 * (LENGTH * 32 + LENGTH)  # the normed state and a number a token; its input is kept for it anyway
    assert (tail.own, tail.keeps_input) == (norm_keeps, True)
    half = counted(hollow("llama", dtype=torch.bfloat16))[-1]
    assert (half.logit_bytes, half.matrix_gradient) == (4 + 2, 61 * 32 * (4 + 2))
    capped = counted(hollow("gemma2", dtype=torch.bfloat16))[-1]
    assert capped.logit_bytes == 2 * 4 + 2
    frozen = hollow("llama")
    frozen.causal_lm.lm_head.requires_grad_(False)
    assert counted(frozen)[-1].matrix_gradient == 0


def test_experts_that_need_values_are_refused_with_a_hint():
    with pytest.raises(UnsupportedModelError, match="Activations of MixtralForCausalLM cannot be counted") as caught:
        counted(hollow("mixtral", experts_implementation="eager"))
    assert caught.value.hint == "With experts, set experts_implementation to grouped_mm in the model's configuration."
