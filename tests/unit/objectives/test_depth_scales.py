"""LayerSkip's weights and curricula, over every subset of exits in any order, against sums taken by hand."""

import itertools
from fractions import Fraction

import pytest

from eetrain.errors import ConfigError
from eetrain.objectives import FULL, LayerSkip
from eetrain.objectives.exit_curricula import ExitCurriculum

# By blocks of the model: e of the exit after each block at scale 1, and of the full depth as a constant and a factor.
SUMS = {
    6: ([0, 1, 3, 6, 10], lambda scale: 5 + scale * 10),
    8: ([0, 1, 3, 6, 10, 15, 21], lambda scale: 7 + scale * 21),
}
TORCHTUNE = {
    6: ([1, 3, 6, 10, 15], lambda scale: 21),
    8: ([1, 3, 6, 10, 15, 21, 28], lambda scale: 36),
}
UNIFORM = {blocks: ([1] * (blocks - 1), lambda scale: 1) for blocks in (6, 8)}
BY_HAND = {"sum": SUMS, "torchtune": TORCHTUNE, "uniform": UNIFORM}
PERIOD, COURSE = 3, 10


def bound(layers, blocks, *arguments, **settings):
    objective = LayerSkip(*arguments, **settings)
    objective.bind(layers, blocks)
    return objective


def on_by_definition(curriculum, layers, blocks, step):
    """Exits that are on, by the paper's inequalities in fractions."""
    if curriculum == "rotational":
        return [layer for place, layer in enumerate(layers) if place % PERIOD == step % PERIOD]
    if curriculum == "gradual":
        reached = Fraction(step, COURSE)
        return [layer for layer in layers if reached >= Fraction(1, 2) * Fraction(blocks - (layer - 1), blocks)]
    return layers


def subsets(blocks):
    for size in range(6):
        yield from itertools.combinations(range(1, blocks), size)


@pytest.mark.parametrize("blocks", [6, 8])
@pytest.mark.parametrize("weighting", BY_HAND)
@pytest.mark.parametrize("curriculum", ["none", "rotational", "gradual"])
def test_weights_of_every_subset_in_any_order(weighting, curriculum, blocks):
    of_exits, of_full = BY_HAND[weighting][blocks]
    course = {"none": {}, "rotational": {"period": PERIOD}, "gradual": {"curriculum_steps": COURSE}}[curriculum]
    steps = {"none": [0], "rotational": range(2 * PERIOD), "gradual": range(COURSE + 2)}[curriculum]
    seen = 0
    for layers in subsets(blocks):
        for scale in (0.0, 0.2, 1.0):
            for order in {layers, layers[::-1], layers[2:] + layers[:2]}:
                objective = bound(order, blocks, weighting, scale, curriculum, **course)
                for step in steps:
                    on = on_by_definition(curriculum, list(layers), blocks, step)
                    scales = {layer: scale * of_exits[layer - 1] for layer in on if scale * of_exits[layer - 1]}
                    total = sum(scales.values()) + of_full(scale)
                    wanted = {layer: value / total for layer, value in scales.items()} | {FULL: of_full(scale) / total}
                    found = objective.depth_weights(step)
                    assert list(found) == list(wanted), "ascending, and no entry for what is off or weighs nothing"
                    assert found == pytest.approx(wanted, rel=1e-12)
                    seen += len(found) > 1
    assert seen > 100


def test_exits_of_a_third_and_two_thirds_weigh_as_their_layers_and_not_as_their_places():
    weights = bound([8, 4], 12, "torchtune").depth_weights(0)
    assert {layer: round(weight, 3) for layer, weight in weights.items()} == {4: 0.081, 8: 0.29, FULL: 0.629}
    # The exit after block 4 counts 10 : 78 whatever else there is.
    for others in ([], [1], [3, 7, 11]):
        weights = bound([4, *others], 12, "torchtune").depth_weights(0)
        assert weights[4] / weights[FULL] == pytest.approx(10 / 78)


def test_one_exit_at_a_time_is_the_variant_of_trl():
    objective = bound([2, 5, 7], 8, "uniform", 0.3, "rotational", 3)
    for step, layer in enumerate([2, 5, 7, 2]):
        assert objective.depth_weights(step) == pytest.approx({layer: 0.3 / 1.3, FULL: 1 / 1.3})


@pytest.mark.parametrize("weighting", BY_HAND)
def test_without_exits_or_scale_the_full_depth_counts_exactly_1(weighting):
    assert bound([], 6, weighting).depth_weights(0) == {FULL: 1.0}
    assert bound([1, 3], 6, weighting, 0.0).depth_weights(0) == {FULL: 1.0}
    assert bound([], 1, weighting).depth_weights(0) == {FULL: 1.0}


@pytest.mark.parametrize("period", range(1, 9))
def test_rotation_has_each_exit_on_once_a_period(period):
    layers = [1, 2, 3, 5, 8, 9, 11]
    curriculum = ExitCurriculum("rotational", period)
    for start in (0, 5, 1000):
        found = [curriculum.on(step, layers, 12) for step in range(start, start + period)]
        assert sorted(itertools.chain(*found)) == layers
        assert found == [curriculum.on(step + period, layers, 12) for step in range(start, start + period)]
    # (k - t) mod R = 0 moves up a layer a step.
    assert all(curriculum.on(step, layers, 12)[0] == layers[step] for step in range(min(period, len(layers))))


@pytest.mark.parametrize("steps", [1, 2, 7, 24, 1000])
def test_the_gradual_curriculum_begins_at_the_deepest_exit_and_ends_halfway(steps):
    layers = list(range(1, 12))
    curriculum = ExitCurriculum("gradual", steps=steps)
    found = [curriculum.on(step, layers, 12) for step in range(steps + 1)]
    assert found[0] == []
    for before, after in itertools.pairwise(found):
        assert after[-len(before) :] == before or not before
        assert after == layers[len(layers) - len(after) :], "deepest first"
    halfway = -(-steps // 2)
    assert all(on == layers for on in found[halfway:])
    assert all(on != layers for on in found[:halfway])
    if steps == 24:  # The exit after block l + 1 comes at step 12 - l.
        assert [len(on) for on in found[:13]] == [0, *range(12)]


def test_the_length_of_the_run_stands_in_for_steps_that_are_not_set():
    objective = bound([1, 2, 3], 4, "uniform", curriculum="gradual")
    with pytest.raises(AssertionError, match="the run was not prepared"):
        objective.depth_weights(0)
    objective.prepare_run(20)
    given = bound([1, 2, 3], 4, "uniform", curriculum="gradual", curriculum_steps=20)
    assert [objective.depth_weights(step) for step in range(21)] == [given.depth_weights(step) for step in range(21)]
    given.prepare_run(float("inf"))
    with pytest.raises(ConfigError) as caught:
        objective.prepare_run(float("inf"))
    assert str(caught.value) == (
        "LayerSkip goes by the length of the run, and this run has no end (curriculum_steps is not set). "
        "HINT: Set model.objective.init_args.curriculum_steps, or trainer.max_steps."
    )


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"weighting": "square"}, "weighting='square' is not known.", "One of: sum, torchtune, uniform."),
        ({"exit_scale": -1.0}, "exit_scale is -1.0.", "a loss weight is a finite number, 0 or larger."),
        ({"curriculum": "spiral"}, "curriculum='spiral' is not known.", "One of: none, rotational, gradual."),
        (
            {"curriculum": "rotational"},
            "curriculum=rotational and period=None.",
            "curriculum=rotational takes a period of 1 or more steps, the others take none.",
        ),
        (
            {"curriculum": "rotational", "period": 0},
            "curriculum=rotational and period=0.",
            "curriculum=rotational takes a period of 1 or more steps, the others take none.",
        ),
        (
            {"period": 2},
            "curriculum=none and period=2.",
            "curriculum=rotational takes a period of 1 or more steps, the others take none.",
        ),
        (
            {"curriculum": "gradual", "curriculum_steps": 0},
            "curriculum=gradual and curriculum_steps=0.",
            "curriculum=gradual takes curriculum_steps of 1 or more, or the run's length if left out.",
        ),
        (
            {"curriculum_steps": 5},
            "curriculum=none and curriculum_steps=5.",
            "curriculum=gradual takes curriculum_steps of 1 or more, or the run's length if left out.",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, message, hint):
    with pytest.raises(ConfigError) as caught:
        LayerSkip(**settings)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_an_exit_at_the_full_depth_is_refused():
    with pytest.raises(ConfigError, match=r"there is an exit after block 6 of 6\. HINT: .* below the last\."):
        bound([2, 6], 6)
