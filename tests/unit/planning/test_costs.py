"""FLOPs and parameters of pieces against torch's own counter on real models, and against known shapes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from eetrain.backbones import Harvester
from eetrain.backbones.loading import fresh_backbone
from eetrain.errors import UnsupportedModelError
from eetrain.exits import ExitConfig, GateConfig, MultiExitModel
from eetrain.planning.costs import piece_costs
from eetrain.planning.matrices import matrices_of
from eetrain.testing.tiny import FAMILIES, tiny_model

LENGTH = 12
IDS = torch.arange(LENGTH)[None] + 1


def model_with_exits(family: str = "llama", head: str = "norm", output: str = "tied", **changes: Any) -> MultiExitModel:
    backbone = tiny_model(family, dtype=torch.float32, attn_implementation="eager", **changes)
    return MultiExitModel(backbone, ExitConfig([1, 3], head=head, output=output))


def counted_forward(model: MultiExitModel) -> dict[str, int]:
    """What torch counts in each piece; eager attention, whose products are plain matrix products."""
    harvester = Harvester(model.backbone, model.anatomy)
    harvest = harvester(IDS)
    shared_norm, shared = model.shared_tail()
    hidden, found = harvest.hidden_BTD, {}
    for layer in range(1, model.num_blocks + 1):
        with FlopCounterMode(display=False) as counter:
            hidden = harvester.run(harvest, hidden, [layer])
        found[f"block {layer}"] = counter.get_total_flops()
        if layer in model.exit_layers:
            head = model.head(layer)
            with FlopCounterMode(display=False) as counter:
                head.projection(shared)(head(hidden, model.head_call(layer, harvest), shared_norm))
            found[f"exit {layer}"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        shared(shared_norm(hidden))
    return {"embed": 0, **found, "tail": counter.get_total_flops()}


def counted_backward(model: MultiExitModel, *, full_depth: bool = True) -> int:
    output = model(IDS, full_depth=full_depth)
    layers = [*model.exit_layers, *([None] if full_depth else [])]
    losses = [F.cross_entropy(model.logits(output, layer)[0], IDS[0]) for layer in layers]
    if not any(loss.requires_grad for loss in losses):
        return 0
    with FlopCounterMode(display=False) as counter:
        torch.stack(losses).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_forward_and_backward_are_what_torch_counts(family):
    model = model_with_exits(family)
    costs = piece_costs(model, LENGTH)
    assert {cost.piece.name: cost.forward_flops for cost in costs} == counted_forward(model)
    assert sum(cost.backward_flops for cost in costs) == counted_backward(model)


@pytest.mark.parametrize("output", ["tied", "own"])
def test_an_exit_that_is_distilled_makes_the_full_depths_logits_as_well(output):
    model = model_with_exits(output=output)
    plain, distilled = piece_costs(model, LENGTH), piece_costs(model, LENGTH, distils=True)
    shared = model.shared_tail()[1]
    with FlopCounterMode(display=False) as counter:
        shared(torch.zeros(1, LENGTH, model.anatomy.hidden_size))
    for before, after in zip(plain, distilled, strict=True):
        more = counter.get_total_flops() if before.piece.kind == "exit" else 0
        assert after.forward_flops == before.forward_flops + more
        assert after.backward_flops == before.backward_flops
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize(("head", "output"), [("tied", "tied"), ("norm", "own"), ("mlp", "tied"), ("block", "own")])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("full_depth", [False, True])
def test_every_head_trained_with_the_backbone_or_alone(head, output, frozen, full_depth):
    model = model_with_exits(head=head, output=output)
    model.backbone.requires_grad_(not frozen)
    costs = piece_costs(model, LENGTH, full_depth=full_depth)
    if full_depth:
        assert {cost.piece.name: cost.forward_flops for cost in costs} == counted_forward(model)
    assert sum(cost.backward_flops for cost in costs) == counted_backward(model, full_depth=full_depth)
    blocks = [cost for cost in costs if cost.piece.kind == "block"]
    assert [cost.backward_flops > 0 for cost in blocks] == [
        not frozen and (full_depth or cost.piece.layer <= 3) for cost in blocks
    ]
    assert [cost.forward_flops > 0 for cost in blocks] == [full_depth or cost.piece.layer <= 3 for cost in blocks]
    assert (costs[-1].forward_flops > 0) == full_depth


def test_adapters_have_gradients_of_their_own_and_the_first_block_is_counted_whole():
    backbone = tiny_model("llama", dtype=torch.float32, attn_implementation="eager")
    wrapped = get_peft_model(backbone, LoraConfig(r=2, target_modules=["v_proj", "down_proj"], lora_dropout=0.0))
    model = MultiExitModel(wrapped, ExitConfig([2], head="norm"))
    costs = piece_costs(model, LENGTH)
    assert {cost.piece.name: cost.forward_flops for cost in costs} == counted_forward(model)
    # In block 1 nothing flows to the input of q, k, v and v's first adapter matrix, nor through the scores, which
    # depend on q and k only: the gradient of p and then those of q and k.
    width, key_width, rank, heads_width = 32, 16, 2, 32
    inputs = LENGTH * (width * width + 2 * width * key_width + width * rank)
    scores = 3 * LENGTH * LENGTH * heads_width
    total = sum(cost.backward_flops for cost in costs)
    assert total - counted_backward(model) == 2 * (inputs + scores)
    block = costs[2]
    base = 2 * LENGTH * (2 * width * width + 2 * width * key_width + 3 * width * 48)
    adapters = 2 * LENGTH * rank * (width + key_width + 48 + width)
    products = 2 * 2 * LENGTH * LENGTH * heads_width
    assert block.forward_flops == base + adapters + products
    assert block.backward_flops == base + 2 * adapters + 2 * products
    assert block.trained_parameters == rank * (width + key_width + 48 + width)


def test_weights_once_a_piece_and_by_one_name_where_they_are_shared():
    model = model_with_exits("llama", tie_word_embeddings=True)
    embed, block, exit_1, *_, tail = piece_costs(model, LENGTH)
    matrix = next(weight for weight in embed.weights if weight.size == 61 * 32)
    assert matrix in exit_1.weights
    assert matrix in tail.weights
    assert (embed.parameters, exit_1.parameters, tail.parameters) == (61 * 32, 61 * 32 + 32, 61 * 32 + 32)
    assert exit_1.weights[0].name == "exits.1.norm.weight"
    assert block.parameters == sum(p.numel() for p in model.backbone.model.layers[0].parameters())
    everything = {weight for cost in piece_costs(model, LENGTH) for weight in cost.weights}
    assert sum(weight.size for weight in everything) == sum(p.numel() for p in model.parameters())
    tied = piece_costs(MultiExitModel(model.backbone, ExitConfig([2], head="tied")), LENGTH)[3]
    assert tied.weights == tail.weights, "final norm and matrix of the backbone"


def test_gates_are_weights_but_do_not_send_gradients_through_the_head():
    backbone = tiny_model("llama", dtype=torch.float32)
    config = ExitConfig([2], head="tied", gates=GateConfig([1.0, 2.0]))
    model = MultiExitModel(backbone, config)
    backbone.requires_grad_(False)
    exit_2 = piece_costs(model, LENGTH)[3]
    assert exit_2.trained_parameters == 2 * 4 + 2
    assert exit_2.backward_flops == 0


def test_hidden_states_have_the_backbones_type():
    model = model_with_exits()
    assert [cost.output_bytes for cost in piece_costs(model, LENGTH)] == [LENGTH * 32 * 4] * 7 + [0]
    half = model_with_exits().to(torch.bfloat16)
    assert piece_costs(half, LENGTH)[0].output_bytes == LENGTH * 32 * 2


def test_a_shape_of_seven_billion_on_the_meta_device_is_six_n_and_attention():
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        backbone = fresh_backbone(config, dtype="bfloat16")
    model = MultiExitModel(backbone, ExitConfig([8, 16], head="norm", output="own"))
    costs = piece_costs(model, 4096)
    backbone_parameters = 6_738_415_616  # of Llama 2 7B
    assert sum(cost.parameters for cost in costs) == backbone_parameters + 2 * (4096 + 32000 * 4096)
    norms = (2 * 32 + 1 + 2) * 4096
    multiplied = backbone_parameters + 2 * (4096 + 32000 * 4096) - 32000 * 4096 - norms
    attention = 12 * 32 * 4096 * 4096  # 12 L T D a token: forward 4, backward 8
    assert sum(cost.flops for cost in costs) == 4096 * (6 * multiplied + attention)


def test_heads_of_different_widths_for_scores_and_values():
    config = CONFIG_MAPPING["deepseek_v3"](
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        pad_token_id=0,
        experts_implementation="eager",
        attn_implementation="eager",
    )
    model = MultiExitModel(AutoModelForCausalLM.from_config(config), ExitConfig([1, 3]))
    costs = piece_costs(model, LENGTH)
    assert {cost.piece.name: cost.forward_flops for cost in costs} == counted_forward(model)
    assert sum(cost.backward_flops for cost in costs) == counted_backward(model)


def test_experts_without_a_number_of_active_ones_are_refused():
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    with pytest.raises(UnsupportedModelError, match="SimpleNamespace does not say how many experts a token runs"):
        list(matrices_of(experts, LENGTH, SimpleNamespace()))
