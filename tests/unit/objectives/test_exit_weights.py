"""Exit weights: what users may write, and the schedules' closed forms."""

from __future__ import annotations

import itertools
import math

import pytest

from eetrain.errors import ConfigError
from eetrain.objectives.weights import ExitWeightSchedule, parse_exit_weights

NAN = float("nan")


def test_a_weight_belongs_to_its_layer_however_layers_are_listed():
    values = {1: 0.1, 2: 0.2, 3: 0.4, 4: 0.8}
    checked = 0
    for size in range(5):
        for layers in itertools.permutations(values, size):
            wanted = {layer: values[layer] for layer in sorted(layers)}
            as_dict = {layer: values[layer] for layer in layers}
            as_list = [values[layer] for layer in sorted(layers)]
            for given in (as_dict, dict(reversed(as_dict.items())), as_list):
                parsed = parse_exit_weights(given, layers)
                assert list(parsed.items()) == list(wanted.items())
            assert parse_exit_weights(0.3, layers) == dict.fromkeys(sorted(layers), 0.3)
            checked += 1
    assert checked == 1 + 4 + 12 + 24 + 24


def test_the_callers_objects_are_left_alone():
    given = {6: 0.5, 3: 1}
    layers = [6, 3]
    parsed = parse_exit_weights(given, layers)
    assert given == {6: 0.5, 3: 1}
    assert list(given) == [6, 3]
    assert layers == [6, 3]
    assert parsed is not given


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        ([1.0], r"weights has 1 entries and the model has 2 exits, at layers \[3, 6\]", "shallowest first"),
        ({3: 1.0, 5: 1.0}, r"weights names layer 5; the model's exits are at layers \[3, 6\]", "as keys"),
        ({3: 1.0}, "weights has no entry for the exit at layer 6", "0 keeps one out"),
        (-0.5, "weights of exit 3 is -0.5", "0 or larger"),
        ([1.0, NAN], "weights of exit 6 is nan", "finite"),
        ({3: 1.0, 6: math.inf}, "weights of exit 6 is inf", "finite"),
        ([1.0, True], "weights of exit 6 is True", "number"),
        ("0.5", "weights of exit 3 is '0.5'", "number"),
        ([1.0, None], "weights of exit 6 is None", "number"),
    ],
)
def test_wrong_weights_are_named(value, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_exit_weights(value, [6, 3])
    assert hint in caught.value.hint


STEPS = 8


def schedule(form, initial, final):
    return ExitWeightSchedule.parse([final], [4], form=form, initial=initial, steps=STEPS)


@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.5), (2.0, 0.5), (0.3, 0.3), (1.0, 0.0)])
def test_closed_forms_end_points_and_monotony(initial, final):
    for form in ("linear", "cosine"):
        values = [schedule(form, initial, final).at(t)[4] for t in range(3 * STEPS)]
        for t, value in enumerate(values):
            r = min(1.0, t / STEPS)
            if form == "cosine":
                r = 0.5 * (1 + math.cos(math.pi * (r + 1)))
            assert value == pytest.approx(initial + r * (final - initial), abs=1e-15)
        assert values[0] == initial
        assert all(value == final for value in values[STEPS:])
        differences = [later - earlier for earlier, later in itertools.pairwise(values)]
        assert all(d * (final - initial) >= 0 for d in differences)


def test_linear_and_cosine_meet_in_the_middle_and_differ_elsewhere():
    linear, cosine = schedule("linear", 0.0, 1.0), schedule("cosine", 0.0, 1.0)
    assert cosine.at(4)[4] == pytest.approx(linear.at(4)[4])
    assert cosine.at(2)[4] == pytest.approx(0.5 - 0.25 * math.sqrt(2))
    assert linear.at(2)[4] == 0.25


def test_warm_up_starts_at_zero_and_constant_never_moves():
    assert ExitWeightSchedule.parse(1.0, [2, 5], form="linear", steps=3).at(0) == {2: 0.0, 5: 0.0}
    constant = ExitWeightSchedule.parse([0.25, 0.5], [6, 3])
    assert all(constant.at(t) == {3: 0.25, 6: 0.5} for t in (0, 1, 10**6))


def test_every_exit_has_its_own_start():
    mixed = ExitWeightSchedule.parse({2: 1.0, 5: 0.0}, [2, 5], form="linear", initial={2: 0.0, 5: 2.0}, steps=4)
    assert mixed.at(1) == {2: 0.25, 5: 1.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "sqrt", "steps": 3}, "schedule is 'sqrt'"),
        ({"form": "linear"}, "schedule is 'linear' and schedule_steps is 0"),
        ({"form": "cosine", "steps": -1}, "schedule is 'cosine' and schedule_steps is -1"),
        ({"steps": 5}, "schedule is 'constant', but initial_weights is None and schedule_steps is 5"),
        ({"initial": 0.0}, "schedule is 'constant', but initial_weights is 0.0 and schedule_steps is 0"),
        ({"form": "linear", "steps": 2, "initial": [1.0]}, "initial_weights has 1 entries"),
        ({"form": "linear", "steps": 2, "initial": -1.0}, "initial_weights of exit 2 is -1.0"),
    ],
)
def test_contradictory_schedules_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExitWeightSchedule.parse(1.0, [2, 5], **settings)
