"""CheckFree's arithmetic: means, weights, homologous blocks, and what is refused, with its words."""

import pytest
import torch

from eetrain.errors import CheckpointError, ConfigError
from eetrain.parallel import PipelineStrategy
from eetrain.parallel.checkfree import Source, Written, homologous, mean, rebuild
from eetrain.parallel.gradient_norm import total_norm
from eetrain.parallel.rebuilt_groups import separate

BLOCKS = "model.backbone.model.layers."
ENDS = ("model.backbone.model.embed_tokens.weight", "model.backbone.lm_head.weight")


def written(sizes, norms=(), exits=(), changes=None, untrained=(), **more):
    """Stages with so many blocks of one matrix and one norm each, and exits after blocks (from 1) with a norm each."""
    stage_of, number = {ENDS[0]: 0}, 0
    for stage, size in enumerate(sizes):
        for _ in range(size):
            stage_of |= {f"{BLOCKS}{number}.mlp.weight": stage, f"{BLOCKS}{number}.norm.weight": stage}
            number += 1
            if number in exits:
                stage_of[f"model.exits.{number}.norm.weight"] = stage
    stage_of |= {ENDS[1]: len(sizes) - 1, **more}
    shapes = {name: (4, 4) if "mlp" in name else (4,) for name in stage_of} | (changes or {})
    return Written(len(sizes), stage_of, set(stage_of) - set(untrained), shapes, BLOCKS, norms)


def refusal(lost, given):
    with pytest.raises(CheckpointError) as caught:
        rebuild(lost, given)
    assert caught.value.hint == "Use an older checkpoint of the run."
    return caught.value.message


def test_the_mean_of_two_tensors_by_hand():
    one, two = torch.tensor([[1.0, -2.0], [0.0, 8.0]]), torch.tensor([[5.0, 2.0], [4.0, 0.0]])
    assert mean([one, two], (3.0, 1.0)).tolist() == [[2.0, -1.0], [1.0, 6.0]]
    assert mean([one, two], (1.0, 3.0)).tolist() == [[4.0, 1.0], [3.0, 2.0]]
    assert mean([one], (0.3,)).tolist() == one.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_neighbours_a_weight_of_zero_and_the_bounds_are_exact(dtype):
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.randn(50, 40, generator=draw).to(dtype) for _ in range(2))
    for weights in ((0.3, 1.7), (1e-4, 3e5), (1.0, 1.0)):
        assert torch.equal(mean([one, one.clone()], weights), one)
        between = mean([one, two], weights)
        assert between.dtype == dtype
        assert (between >= torch.minimum(one, two)).all()
        assert (between <= torch.maximum(one, two)).all()
    assert torch.equal(mean([one, two], (0.7, 0.0)), one)
    assert torch.equal(mean([one, two], (0.0, 0.7)), two)


def test_weights_are_norms_to_a_power():
    given = written([1, 1, 1], norms=[0.5, None, 2.0])
    assert given.weights(1, 1) == (0.5 + 1e-4, 2.0 + 1e-4)
    assert given.weights(1, 2) == (0.25 + 1e-4, 4.0 + 1e-4)
    assert written([1, 1, 1], norms=[0.0, 1.0, 0.0]).weights(1, 1) == (1e-4, 1e-4)
    for unknown in ([None, 1.0, 2.0], [1.0, 1.0, None], [1.0], []):
        assert written([1, 1, 1], norms=unknown).weights(1, 2) == (1.0, 1.0)


def test_norms_of_parts_add_up():
    assert total_norm([9.0, 16.0]) == 5.0
    assert total_norm([4.0]) == 2.0
    for squares in ([4.0, None], [float("nan")], [float("inf"), 1.0]):
        assert total_norm(squares) is None


def test_homologous_blocks_of_all_small_sizes():
    for count in range(1, 9):
        assert [homologous(place, count, count) for place in range(count)] == list(range(count))
        for other in range(1, 9):
            for place in range(count):
                middle = (place + 0.5) / count
                found = homologous(place, count, other)
                assert found / other <= middle < (found + 1) / other
    assert [homologous(place, 4, 2) for place in range(4)] == [0, 0, 1, 1]
    assert [homologous(place, 2, 4) for place in range(2)] == [1, 3]
    assert [homologous(place, 2, 3) for place in range(2)] == [0, 2]
    assert [homologous(place, 3, 1) for place in range(3)] == [0, 0, 0]


def test_blocks_are_the_mean_of_those_at_their_place():
    sources = rebuild({1}, written([2, 2, 2], norms=[1.0, 5.0, 3.0]))
    assert sources == {
        f"{BLOCKS}{own}.{part}.weight": Source(
            (f"{BLOCKS}{own - 2}.{part}.weight", f"{BLOCKS}{own + 2}.{part}.weight"), (1.0001, 3.0001)
        )
        for own in (2, 3)
        for part in ("mlp", "norm")
    }


def test_blocks_of_unequal_stages():
    sources = rebuild({1}, written([1, 3, 2]))
    found = {
        name.removeprefix(BLOCKS)[0]: [of.removeprefix(BLOCKS)[0] for of in source.names]
        for name, source in sources.items()
    }
    # Blocks 1, 2, 3 are the stage's; the middle of the second one lies where block 5 begins.
    assert found == {"1": ["0", "4"], "2": ["0", "5"], "3": ["0", "5"]}


def test_two_stages_that_are_not_neighbours():
    sources = rebuild({1, 3}, written([1] * 5, norms=[1.0, 2.0, 3.0, 4.0, 5.0]))
    assert sources[f"{BLOCKS}1.mlp.weight"].weights == (1.0001, 3.0001)
    assert sources[f"{BLOCKS}3.mlp.weight"] == Source(
        (f"{BLOCKS}2.mlp.weight", f"{BLOCKS}4.mlp.weight"), (3.0001, 5.0001)
    )


def test_exits_are_copies_of_the_nearest_that_is_alike():
    def source_of(layer, **settings):
        return rebuild({1}, written([2, 2, 2], **settings))[f"model.exits.{layer}.norm.weight"]

    def copy(layer):
        return Source((f"model.exits.{layer}.norm.weight",), (1.0,))

    assert source_of(3, exits=[1, 2, 3, 5]) == copy(2)
    assert source_of(4, exits=[1, 3, 4, 5]) == copy(5), "exit 3 is lost as well"
    assert source_of(3, exits=[1, 3, 5]) == copy(1), "the shallower of two"
    assert source_of(3, exits=[3]) == Source()
    other = {"model.exits.2.norm.weight": (8,)}
    assert source_of(3, exits=[1, 2, 3], changes=other) == copy(1), "one of another shape is not alike"
    assert source_of(3, exits=[2, 3], **{"model.exits.2.norm.bias": 0}) == Source()


def test_adapters_and_frozen_weights_are_as_the_run_begins():
    adapter = f"{BLOCKS}2.mlp.lora_A.default.weight"
    frozen = f"{BLOCKS}3.mlp.weight"
    sources = rebuild({1}, written([2, 2, 2], untrained=[frozen], **{adapter: 1}))
    assert sources[adapter] == sources[frozen] == Source()
    assert len(sources[f"{BLOCKS}2.mlp.weight"].names) == 2


@pytest.mark.parametrize(
    ("lost", "sizes", "message"),
    [
        ({0}, [1, 1, 1], "Stage 0 cannot be rebuilt: embedding, final norm and output matrix are on the first and the "
         "last stage, and no stage beside them holds their like."),
        ({1, 2}, [1, 1, 1], "Stage 2 cannot be rebuilt: embedding, final norm and output matrix are on the first and "
         "the last stage, and no stage beside them holds their like."),
        ({0}, [4], "Stage 0 cannot be rebuilt: embedding, final norm and output matrix are on the first and the "
         "last stage, and no stage beside them holds their like."),
        ({1, 2, 4}, [1] * 6, "Stages 1 and 2 cannot be rebuilt: each is the other's neighbour."),
        ({3}, [1, 1, 1], "Stage 3 cannot be rebuilt: the checkpoint was written by 3 stages, counted from 0."),
        ({-1}, [1, 1, 1], "Stage -1 cannot be rebuilt: the checkpoint was written by 3 stages, counted from 0."),
    ],
)  # fmt: skip
def test_stages_without_neighbours_are_refused(lost, sizes, message):
    assert refusal(lost, written(sizes)) == message


def test_tensors_without_their_like_are_refused_by_name():
    name, before = f"{BLOCKS}1.mlp.weight", f"{BLOCKS}0.mlp.weight"
    assert refusal({1}, written([1, 1, 1], changes={before: (4, 5)})) == (
        f"Stage 1 cannot be rebuilt: {name} has the shape (4, 4), but its counterpart on stage 0, {before}, (4, 5)."
    )
    experts = {f"{BLOCKS}1.experts.weight": 1, f"{BLOCKS}0.experts.weight": 0}
    assert refusal({1}, written([1, 1, 1], **experts)) == (
        f"Stage 1 cannot be rebuilt: {BLOCKS}1.experts.weight has no counterpart on stage 2 ({BLOCKS}2.experts.weight)."
    )
    given = written([1, 1, 1])
    gone = Written(3, {k: v for k, v in given.stage_of.items() if v != 2}, given.trained, given.shapes, BLOCKS)
    assert refusal({1}, gone) == f"Stage 1 cannot be rebuilt: {name} has no counterpart on stage 2 (no block)."
    shared = {"model.backbone.model.norm.weight": 1}
    assert refusal({1}, written([1, 1, 1], **shared)) == (
        "Stage 1 cannot be rebuilt: model.backbone.model.norm.weight belongs to no block and no exit."
    )
    shapes = {k: v for k, v in given.shapes.items() if k != name}
    assert refusal({1}, Written(3, given.stage_of, given.trained, shapes, BLOCKS)) == (
        f"Stage 1 cannot be rebuilt: this run has no {name}."
    )


def optimizer_of(groups):
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def parameters(count):
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_rebuilt_parameters_have_groups_and_rates_of_their_own():
    mine, rebuilt, other = parameters(2), parameters(2), parameters(1)
    optimizer, schedule = optimizer_of(
        [{"params": [mine[0], rebuilt[0], mine[1]], "name": "backbone", "lr": 0.5}, {"params": other, "name": "exits"}]
    )
    optimizer.add_param_group({"params": [rebuilt[1]], "name": "gates", "lr": 0.25})
    schedule.base_lrs.append(0.25)
    schedule.lr_lambdas.append(schedule.lr_lambdas[0])
    separate(optimizer, schedule, set(map(id, rebuilt)), 1.1)
    found = [(group["name"], [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    assert found == [
        ("backbone", [id(mine[0]), id(mine[1])]),
        ("backbone_rebuilt", [id(rebuilt[0])]),
        ("exits", [id(other[0])]),
        ("gates_rebuilt", [id(rebuilt[1])]),
    ]
    assert schedule.base_lrs == pytest.approx([0.5, 0.55, 1.0, 0.275])
    assert [group["initial_lr"] for group in optimizer.param_groups] == schedule.base_lrs
    optimizer.step()
    schedule.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.25, 0.275, 0.5, 0.1375]), "the course is the same, a tenth above"
    assert schedule.get_last_lr() == rates


def test_with_a_filler_no_group_is_left_out():
    mine, rebuilt = parameters(1), parameters(1)
    optimizer, schedule = optimizer_of([{"params": mine, "name": "backbone"}, {"params": rebuilt, "name": "exits"}])
    made = []

    def filler(like):
        made.append((like["name"], torch.nn.Parameter(torch.zeros(1))))
        return made[-1][1]

    separate(optimizer, schedule, {id(rebuilt[0])}, 2.0, filler)
    assert [name for name, _ in made] == ["backbone", "exits"]
    assert [group["name"] for group in optimizer.param_groups] == [
        "backbone", "backbone_rebuilt", "exits", "exits_rebuilt"
    ]  # fmt: skip
    members = [id(group["params"][0]) for group in optimizer.param_groups]
    assert members == [id(mine[0]), id(made[0][1]), id(made[1][1]), id(rebuilt[0])]


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"rebuild": "always"}, "rebuild='always' is not known.", "One of: never, lost, or a list of stages, from 0."),
        ({"rebuild_power": 3}, "rebuild_power=3 is not known.", "One of: 1, 2."),
        ({"rebuild_lr_factor": 0.0}, "rebuild_lr_factor=0.0.", "Set it above 0; 1 changes nothing."),
        ({"rebuild_lr_factor": float("inf")}, "rebuild_lr_factor=inf.", "Set it above 0; 1 changes nothing."),
    ],
)
def test_settings_are_checked(settings, message, hint):
    with pytest.raises(ConfigError) as caught:
        PipelineStrategy(**settings)
    assert (caught.value.message, caught.value.hint) == (f"trainer.strategy.init_args.{message}", hint)


def test_off_by_default():
    assert PipelineStrategy()._rebuilder.rebuild == "never"
    assert PipelineStrategy()._rebuilder.record() == {}
