"""Plans of a model whose costs are round numbers, by hand; shapes and devices by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from eetrain.errors import CheckpointError, ConfigError, TopologyError
from eetrain.exits import ExitConfig
from eetrain.planning.activations import PieceActivations
from eetrain.planning.cluster import DEVICES, Cluster, find_device
from eetrain.planning.costs import PieceCost, Weight
from eetrain.planning.memory import TrainingState
from eetrain.planning.pieces import Piece
from eetrain.planning.plan import Workload
from eetrain.planning.planner import Planner
from eetrain.planning.shapes import SHAPES, find_config, hollow_model
from eetrain.planning.timing import reduce_seconds, stage_times
from eetrain.testing.tiny import tiny_config

CLUSTER = Cluster(devices=4, flops=200.0, memory=1e6, bandwidth=1e9, utilisation=0.5, latency=0.0)
SHARED = Weight("matrix", 500, True)


def piece(kind: Any, layer: int = 0, forward: int = 0) -> PieceCost:
    own = Weight(f"{kind} {layer}", 100, True)
    weights = (own, SHARED) if kind in ("exit", "tail") else (own,)
    return PieceCost(Piece(kind, layer), forward, 2 * forward, weights, 0 if kind == "tail" else 8)


def pieces(exits: tuple[int, ...] = (2, 4)) -> tuple[PieceCost, ...]:
    """8 blocks of 100 + 200 FLOPs a row, exits and tail of 50 + 100."""
    found = [piece("embed")]
    for layer in range(1, 9):
        found.append(piece("block", layer, 100))
        if layer in exits:
            found.append(piece("exit", layer, 50))
    return (*found, piece("tail", 0, 50))


def planner(exits: tuple[int, ...] = (2, 4), cluster: Cluster = CLUSTER, **work: Any) -> Planner:
    costs = pieces(exits)
    nothing = tuple(PieceActivations(10, True) for _ in costs)
    workload = Workload(**{"batch_size": 24, "length": 3, **work})
    return Planner(costs, nothing, cluster, workload, "float32")


def test_step_time_of_four_stages_by_hand():
    plan = planner().plan(planner().layout(4))
    layout = plan.layout
    assert [" ".join(stage.pieces) for stage in layout.stages] == [
        "embed block 1 block 2", "exit 2 block 3 block 4", "exit 4 block 5 block 6", "block 7 block 8 tail"
    ]  # fmt: skip
    # 100 FLOP/s: blocks 1 s + 2 s, heads 1.5 s in the backward step; transfers of 8 bytes take 8 ns.
    assert [(own.times.forward, own.times.heads, own.times.backward) for own in layout.stages] == [
        (2, 0, 4), (2, 1.5, 4), (2, 1.5, 4), (2, 1.5, 4)
    ]  # fmt: skip
    assert (layout.replicas, layout.micro_batches) == (1, 24)
    pipeline = 23 * 7.5 + 3 * 7.5 + 6
    assert layout.timeline.seconds == pytest.approx(pipeline, abs=1e-5)
    assert plan.plain_seconds == pytest.approx(23 * 7.5 + 3 * 6 + 7.5, abs=1e-5)
    assert [(own.layer, own.stage) for own in plan.exits] == [(2, 1), (4, 2)]
    assert [own.head_seconds for own in plan.exits] == [1.5, 1.5]
    assert [own.seconds for own in plan.exits] == pytest.approx([1.5, 1.5], abs=1e-5)
    assert [own.percent for own in plan.exits] == pytest.approx([150 / (pipeline - 1.5)] * 2, abs=1e-4)
    assert plan.exits_percent == pytest.approx(100 * 3 / (pipeline - 3), abs=1e-4)
    busy = 24 * (6 + 3 * 7.5)
    assert layout.timeline.bubble_share == pytest.approx(1 - busy / (4 * pipeline), abs=1e-6)
    assert layout.stages[0].bubble == pytest.approx(1 - 24 * 6 / pipeline, abs=1e-6)
    assert layout.flops == 24 * (8 * 300 + 3 * 150)
    assert layout.tokens_per_second == pytest.approx(24 * 3 / layout.step_seconds)
    assert layout.peak_share == pytest.approx(layout.flops / (layout.step_seconds * 4 * 200))


def test_sums_of_gradients_at_the_end():
    found = planner(cluster=replace(CLUSTER, devices=8, bandwidth=1e3, latency=0.5))
    layout = found.layout(4)
    assert layout.replicas == 2
    # Two replicas: 2 transfers of half the gradient; stages 1 to 3 share the matrix: 4 transfers of a third of it.
    replicas = 2 * 0.5 + 4 * (2 * 100 + 100 + 500) / 1e3
    stages = 4 * 0.5 + 4 / 3 * 4 * 500 / 1e3
    assert layout.reduce_seconds == pytest.approx(replicas + stages)
    assert layout.step_seconds == layout.timeline.seconds + layout.reduce_seconds
    alone = reduce_seconds(pieces(), (0, len(pieces())), CLUSTER, TrainingState("float32"))
    assert alone == 0, "one stage of one replica has nobody to sum with"


def test_checkpointing_runs_blocks_again_but_not_heads():
    costs = pieces()
    plain = stage_times(costs, (0, 6, 12), CLUSTER, rows=2)
    again = stage_times(costs, (0, 6, 12), CLUSTER, rows=2, checkpointing=True)
    assert [(own.forward, own.heads, own.backward) for own in plain] == [(8, 3, 16), (8, 6, 16)]
    assert [(own.forward, own.heads, own.backward) for own in again] == [(8, 3, 24), (8, 6, 24)]
    without = stage_times(costs, (0, 6, 12), CLUSTER, rows=2, without=[2, 4])
    assert [own.heads for own in without] == [0, 3]
    frozen = tuple(replace(cost, backward_flops=0) for cost in costs)
    assert all(own.backward == 0 for own in stage_times(frozen, (0, 6, 12), CLUSTER, rows=1, checkpointing=True))


def test_the_best_number_of_stages_fits_first_and_is_fast_then():
    roomy = planner(zero_stage=0).layouts()
    assert [len(layout.stages) for layout in roomy] == [1, 2, 4], "no bubble is fastest"
    assert [layout.micro_batches for layout in roomy] == [6, 12, 24]
    one, two = roomy[0].peak_memory, roomy[1].peak_memory
    assert one > two > roomy[2].peak_memory
    tight = planner(cluster=replace(CLUSTER, memory=(one + two) / 2), zero_stage=0).layouts()
    assert [len(layout.stages) for layout in tight] == [2, 4, 1]
    assert [layout.misfits for layout in tight] == [(), (), (0,)]
    none = planner(cluster=replace(CLUSTER, memory=1.0), zero_stage=0).layouts()
    assert [len(layout.stages) for layout in none] == [4, 2, 1], "the smallest first"
    assert none[0].misfits == (0, 1, 2, 3)


def test_counts_that_do_not_divide_the_batch_are_left_out():
    assert [len(layout.stages) for layout in planner(batch_size=2).layouts()] == [2, 4]
    assert [layout.micro_batches for layout in planner(batch_size=8, micro_batch_size=4).layouts()] == [1, 2]


def test_extra_micro_batches_in_the_bubbles_of_equal_stages():
    even = planner((2, 4, 6), fill=True)
    plan = even.plan(even.layout(4))
    assert [" ".join(stage.pieces) for stage in plan.layout.stages][1] == "block 3 block 4 exit 4"
    # r = (4 + 1.5) / 2: (3 r - 0) / (1 + r) = 2.2, (2 r - 1) / (1 + r) = 1.2; r / (1 + r) = 0.73 a stage at the end.
    assert plan.filling.warmup == (2, 1, 0, 0)
    assert plan.filling.cooldown == (0, 0, 1, 2)
    assert plan.filling.extra_seconds < 1e-6, "but for transfers of 8 ns"
    assert plan.timeline is plan.filling.timeline
    held = plan.layout.stages[0].memory.activations / 4
    assert plan.filling.memory[0] == plan.layout.stages[0].memory.total + 2 * held
    assert plan.filling.memory[3] == plan.layout.stages[3].memory.total


def test_filling_needs_an_exit_on_the_way_and_says_what_it_costs():
    for exits in ((), (8,)):
        bare = planner(exits, fill=True)
        assert bare.plan(bare.layout(4)).filling.warmup == (0, 0, 0, 0)
    assert planner().plan(planner().layout(4)).filling is None
    uneven = planner((2,), fill=True)
    plan = uneven.plan(uneven.layout(4))
    # Two in the cool-down take the last stage 2 * 7.5 s, while the way back through the others takes 4 + 5.5 + 4 s.
    assert plan.filling.cooldown == (0, 0, 1, 2)
    assert plan.filling.extra_seconds == pytest.approx(15 - 13.5, abs=1e-6)


@pytest.mark.parametrize(
    ("stages", "work", "cluster", "message", "hint"),
    [
        (3, {}, CLUSTER, "stages=3 does not divide the 4 processes of the run.", "set stages to one of 1, 2, 4"),
        (9, {}, CLUSTER, "stages=9, but the backbone has 8 blocks", "Set stages to 8 or fewer."),
        (
            2,
            {"batch_size": 9},
            CLUSTER,
            "batch_size=9 cannot be cut into micro-batches of 1 rows for 2 replicas of the pipeline.",
            "Set batch_size, the rows of one step over all replicas, to a multiple of 2.",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(stages, work, cluster, message, hint):
    with pytest.raises(TopologyError) as caught:
        planner(cluster=cluster, **work).layout(stages)
    assert message in caught.value.message
    assert hint in caught.value.hint
    if work:
        with pytest.raises(TopologyError, match=r"batch_size=9 cannot be cut .* for 16 replicas"):
            planner(cluster=replace(CLUSTER, devices=16 * 8), **work).layouts()


def test_all_numbers_are_in_the_dictionary():
    found = planner((2, 4), fill=True)
    plan = found.plan(found.layout(4))
    data = plan.to_dict()
    assert data["num_stages"] == len(data["stages"]) == 4
    assert data["stages"][1]["pieces"] == ("exit 2", "block 3", "block 4")
    assert data["stages"][1]["memory"]["total"] == plan.layout.stages[1].memory.total
    assert data["exits"][0] == {
        "layer": 2, "stage": 1, "head_seconds": 1.5, "seconds": plan.exits[0].seconds, "percent": plan.exits[0].percent
    }  # fmt: skip
    assert data["filling"]["warmup"] == list(plan.filling.warmup)
    assert data["step_seconds"] == data["pipeline_seconds"] + data["reduce_seconds"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3-70b", 70_553_706_496), ("llama-3.1-405b", 405_853_388_800)],
)
def test_shapes_have_the_published_sizes(name, parameters):
    model = hollow_model(find_config(name), ExitConfig(layers=[]))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.num_blocks == SHAPES[name]["num_hidden_layers"]


def test_what_a_hollow_model_trains():
    fields = {**tiny_config("llama").to_dict(), "model_type": "llama"}
    frozen = hollow_model(fields, ExitConfig(layers=[2]), tuning="frozen", full_depth=False)
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["exits.2.norm.weight"]
    adapted = hollow_model(fields, ExitConfig(layers=[2]), tuning="lora", precision="float32")
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained[0].endswith("lora_A.default.weight")
    assert len(trained) == 4 * 7 * 2 + 1
    assert all(p.device.type == "meta" for p in adapted.parameters())
    shallow = hollow_model(fields, ExitConfig(layers=[2]), full_depth=False)
    assert not any(p.requires_grad for p in shallow.backbone.model.layers[2].parameters())
    with pytest.raises(ConfigError, match="There is nothing to train: the backbone is frozen"):
        hollow_model(fields, ExitConfig(layers=[2], head="tied"), tuning="frozen")


def test_names_and_numbers_that_are_wrong():
    with pytest.raises(CheckpointError, match=r"Shapes by name: llama-2-7b, llama-3-70b, llama-3.1-405b\."):
        find_config("/nowhere/at/all")
    with pytest.raises(ConfigError, match=r"device='h1' is not known. HINT: One of: a100-40gb, .*; or custom, with"):
        find_device("h1")
    for name, value in (("devices", 0), ("flops", 0.0), ("memory", -1.0), ("bandwidth", 0.0), ("utilisation", 1.1)):
        with pytest.raises(ConfigError, match=f"{name}={value} is out of its range."):
            replace(CLUSTER, **{name: value})


def test_devices_are_plausible():
    for device in DEVICES.values():
        assert 1e14 < device.flops < 1e16
        assert 1e10 < device.memory < 1e12
        assert 1e10 < device.bandwidth < 1e12


def test_transfers():
    cluster = replace(CLUSTER, latency=2.0, bandwidth=10.0)
    assert cluster.speed == 100
    assert cluster.transfer(30) == 2 + 3
    assert cluster.all_reduce(30, 3) == 4 * 2 + 4 * 10 / 10
    assert cluster.all_reduce(30, 1) == 0
