"""Policy strings and where policies let tokens stop."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import get_args

import pytest
import torch

from eetrain import ExitConfig
from eetrain.decoding import Always, ExitPolicy, Gated, Never, Route, Scheduled, Threshold, parse_policy
from eetrain.decoding.confidence import Evidence
from eetrain.decoding.policy import Repair
from eetrain.errors import ConfigError
from eetrain.exits.gates import GateConfig
from eetrain.schedules import SkipDecode

GRID = [
    Threshold(value, measure, repair, cap, exits)
    for value, measure, repair, cap, exits in itertools.product(
        (0.0, 0.5, 0.9, -0.25, 1.5, 1e-06, 0.123456),
        ("max", "margin", "entropy", "saturation"),
        ("recompute", "propagate"),
        (1, 8, 100),
        (None, (3,), (3, 6, 12)),
    )
]


def test_every_policy_of_a_grid_is_read_back_as_written():
    assert len(GRID) == 504
    for policy in [Never(), *(Always(layer) for layer in range(1, 5)), *GRID]:
        assert parse_policy(str(policy)) == policy, str(policy)


@pytest.mark.parametrize("value", [1 / 3, 0.1 + 0.2, 0.99999999, 2**0.5, 1e-9])
def test_no_digit_of_a_threshold_is_lost(value):
    assert parse_policy(str(Threshold(value))).value == value


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("never", Never()),
        (" always:6 ", Always(6)),
        ("threshold:0.9", Threshold(0.9)),
        ("threshold:0.9, measure=margin", Threshold(0.9, "margin")),
        ("threshold:0.9,cap=2,repair=propagate", Threshold(0.9, repair="propagate", cap=2)),
        ("threshold:1e-3,exits=6+3", Threshold(1e-3, exits=(6, 3))),
    ],
)
def test_strings(text, policy):
    assert parse_policy(text) == policy


def test_short_forms_leave_defaults_out():
    assert str(Threshold(0.9)) == "threshold:0.9"
    assert str(Threshold(0.5, "margin", "propagate", 3, (1, 2))) == (
        "threshold:0.5,measure=margin,repair=propagate,cap=3,exits=1+2"
    )
    assert (str(Never()), str(Always(2))) == ("never", "always:2")


def test_a_policy_object_is_returned_as_it_is():
    policy = Threshold(0.3)
    assert parse_policy(policy) is policy


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is none of never, always, "),
        ("sometimes", "'sometimes' is none of never, always, "),
        ("never:1", "'never' takes no value"),
        ("always", "'always' needs a value"),
        ("always:", "'always' needs a value"),
        ("always:1.5", "layer='1.5' is not readable"),
        ("always:x", "layer='x' is not readable"),
        ("threshold", "'threshold' needs a value"),
        ("threshold:high", "value='high' is not readable"),
        ("threshold:0.9,speed=3", "'speed' is not an option of 'threshold'"),
        ("threshold:0.9,cap=1,cap=2", "'cap' is not an option of 'threshold', or stands there twice"),
        ("threshold:0.9,cap=few", "cap='few' is not readable"),
        ("threshold:0.9,exits=1+x", r"exits='1\+x' is not readable"),
        ("gate:0.5,conditional=maybe", "conditional='maybe' is not readable"),
        ("threshold:0.9,", "'' is not an option of 'threshold'"),
        ("never,cap=1", "'cap' is not an option of 'never'"),
        ("always:3,cap=1", "'cap' is not an option of 'always'"),
    ],
)
def test_strings_that_do_not_parse(text, reason):
    with pytest.raises(ConfigError, match=f"^Exit policy '.*' does not parse: {reason}") as caught:
        parse_policy(text)
    assert caught.value.hint.startswith("For example never, always:6, threshold:0.9")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("threshold:0.9,measure=luck", "measure='luck' is not known. HINT: One of: max, margin, entropy, saturation."),
        ("threshold:0.9,repair=pray", "repair='pray' is not known. HINT: One of: recompute, propagate."),
        ("threshold:nan", "threshold:nan lets no token leave: nan is not a number. HINT: For example 0.9."),
        ("threshold:0.9,cap=0", "cap=0, must be at least 1. HINT: Use never to turn exits off."),
    ],
)
def test_values_that_make_no_sense(text, reason):
    with pytest.raises(ConfigError) as caught:
        parse_policy(text)
    assert str(caught.value) == reason


def test_routes():
    assert Never().route((2, 4), 6) == Route((), 6)
    assert Always(4).route((2, 4), 6) == Route((), 4)
    assert Threshold(0.5).route((2, 4), 6) == Route((2, 4), 6)
    assert Threshold(0.5).route((2, 4, 6), 6) == Route((2, 4), 6), "an exit at the last block saves nothing"
    assert Threshold(0.5, exits=(4, 2)).route((1, 2, 4), 6) == Route((2, 4), 6)
    assert Threshold(0.5, exits=(2, 2)).route((2, 4), 6) == Route((2,), 6), "or block 2 would run twice"
    assert Route((2, 4), 6).boundaries == (2, 4, 6)
    assert Always(4).ends_at_exit
    assert not Threshold(0.5).ends_at_exit


@pytest.mark.parametrize(
    ("policy", "layers", "message"),
    [
        (
            Always(3),
            (2, 4),
            "Exit policy always:3: the model has no exit after block 3. HINT: Exits stand after blocks 2, 4.",
        ),
        (
            Always(3),
            (),
            "Exit policy always:3: the model has no exit after block 3. HINT: Exits stand after blocks none.",
        ),
        (
            Threshold(0.5, exits=(2, 3)),
            (2, 4),
            "Exit policy threshold:0.5,exits=2+3: the model has no exit after block 3. "
            "HINT: Exits stand after blocks 2, 4.",
        ),
        (
            Threshold(0.5),
            (6,),
            "Exit policy threshold:0.5: the model has no exit below its last block. HINT: Exits stand after blocks 6.",
        ),
    ],
)
def test_policies_that_do_not_fit(policy, layers, message):
    with pytest.raises(ConfigError) as caught:
        policy.route(layers, 6)
    assert str(caught.value) == message


def evidence(probabilities: list[list[float]]) -> Evidence:
    logits = torch.tensor(probabilities).log()
    states = torch.ones(len(probabilities), 2)
    return Evidence(1, states, states, lambda: logits)


def test_gate_strings():
    assert parse_policy("gate:0.5") == Gated((0.5,))
    assert parse_policy("gate:0.4+0.6,cost_weight=1,conditional=true,repair=propagate") == Gated(
        (0.4, 0.6), 1.0, True, "propagate"
    )
    for policy in itertools.starmap(
        Gated,
        itertools.product(
            ((0.5,), (0.0, 1.0), (1 / 3, 0.25, 2.0)), (None, 0.1, 30.0), (False, True), get_args(Repair), (1, 8)
        ),
    ):
        assert parse_policy(str(policy)) == policy, str(policy)
    assert str(Gated((0.5,), cost_weight=0.1)) == "gate:0.5,cost_weight=0.1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gate:-0.1", "gate:-0.1 is not a probability. HINT: For example gate:0.5."),
        ("gate:0.5+nan", "gate:nan is not a probability. HINT: For example gate:0.5."),
        ("gate:0.5,repair=pray", "repair='pray' is not known. HINT: One of: recompute, propagate."),
        ("gate:0.5,cap=0", "cap=0, must be at least 1. HINT: Use never to turn exits off."),
    ],
)
def test_gates_that_make_no_sense(text, reason):
    with pytest.raises(ConfigError) as caught:
        parse_policy(text)
    assert str(caught.value) == reason


@dataclass
class Shape:
    """What policies know of a model with 6 blocks and exits after 2 and 4."""

    config: ExitConfig
    full_depth_loaded: bool = True
    exit_layers: tuple[int, ...] = (2, 4)
    num_blocks: int = 6


def shape(cost_weights: list[float] | None = None, **rest) -> Shape:
    gates = None if cost_weights is None else GateConfig(cost_weights)
    return Shape(ExitConfig(layers=[2, 4], gates=gates), **rest)


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        (
            "gate:0.5",
            shape(),
            "Exit policy gate:0.5: the model has no gates. "
            "HINT: Train them with eetrain.objectives.JointGating, or use threshold:0.9.",
        ),
        (
            "gate:0.5",
            shape([0.3, 1.0]),
            "Exit policy gate:0.5: the model has gates for 2 cost weights. "
            "HINT: Choose one of 0.3, 1: gate:0.5,cost_weight=0.3.",
        ),
        (
            "gate:0.5,cost_weight=2",
            shape([0.3, 1.0]),
            "Exit policy gate:0.5,cost_weight=2: no gates were trained for cost_weight=2. "
            "HINT: There are gates for 0.3, 1.",
        ),
        (
            "gate:0.5,cost_weight=2",
            shape([0.3]),
            "Exit policy gate:0.5,cost_weight=2: no gates were trained for cost_weight=2. "
            "HINT: There are gates for 0.3.",
        ),
        (
            "gate:0.1+0.2+0.3",
            shape([1.0]),
            "Exit policy gate:0.1+0.2+0.3 has 3 values for 2 exits. "
            "HINT: Give one for all, or one for each of the exits after blocks 2, 4.",
        ),
        (
            "gate:0.5",
            shape([1.0], full_depth_loaded=False),
            "Exit policy gate:0.5 runs the full depth, but only blocks 1..6 were loaded. "
            "HINT: Load the whole backbone (depth=None), or use an always:l policy.",
        ),
        (
            "static:3",
            shape(full_depth_loaded=False),
            "Exit policy static:3 runs the full depth, but only blocks 1..6 were loaded. "
            "HINT: Load the whole backbone (depth=None), or use an always:l policy.",
        ),
        ("static:7", shape(), "static has blocks=7, but the model has 6 blocks. HINT: Set it to 6 or less."),
        (
            "skipdecode:speed=4",
            shape(),
            "A speed of 4 leaves 1.5 of 6 blocks. HINT: With warmup=1 it can be 1 to 3.",
        ),
    ],
)
def test_policies_that_do_not_fit_a_model(text, model, message):
    with pytest.raises(ConfigError) as caught:
        parse_policy(text).check(model)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("gate:0.5", shape([1.0])),
        ("gate:0.5+0.6,cost_weight=0.3", shape([0.3, 1.0])),
        ("skipdecode:max=6,min=2", shape()),
        ("always:4", shape(full_depth_loaded=False)),
    ],
)
def test_policies_that_fit_a_model(text, model):
    parse_policy(text).check(model)


def test_schedules_are_policies():
    policy = parse_policy("skipdecode:max=9,min=4,length=48")
    assert policy == Scheduled(SkipDecode(max=9, min=4, length=48))
    assert str(policy) == "skipdecode:max=9,min=4,length=48"


def gate_evidence(gates_RG: list[list[float]]) -> Evidence:
    states = torch.ones(len(gates_RG), 2)
    return Evidence(1, states, states, lambda: states, lambda cost_weight: torch.tensor(gates_RG))


def test_a_gate_at_its_value_is_open():
    both = gate_evidence([[0.5], [0.4999]])
    assert Gated((0.5,)).leave(both).tolist() == [True, False]


def test_each_exit_is_compared_with_its_own_value():
    second = gate_evidence([[0.9, 0.5], [0.1, 0.3]])
    assert Gated((0.2, 0.4)).leave(second).tolist() == [True, False]
    assert Gated((0.4, 0.2)).leave(second).tolist() == [True, True]
    assert Gated((0.4,)).leave(second).tolist() == [True, False], "one value for all"
    # 0.3 of all, of the 0.6 that came so far, is 0.5.
    assert Gated((0.5,), conditional=True).leave(gate_evidence([[0.4, 0.3001], [0.4, 0.2999]])).tolist() == [
        True,
        False,
    ]


def test_a_threshold_is_strict():
    both = evidence([[0.5, 0.25, 0.25], [0.625, 0.25, 0.125]])
    assert Threshold(0.5).leave(both).tolist() == [False, True]
    assert Threshold(0.25, "margin").leave(both).tolist() == [False, True]
    assert Threshold(1.0).leave(evidence([[1.0, 0.0, 0.0]])).tolist() == [False], "above 1 turns exits off"


def test_a_policy_without_tests_is_never_asked():
    with pytest.raises(AssertionError, match="never tests no exit, but was asked about exit 1"):
        Never().leave(evidence([[0.5, 0.5]]))


def test_a_policy_of_ones_own_runs():
    class EveryOther(ExitPolicy):
        """The whole batch leaves at exit 1 at every second step."""

        def __init__(self):
            self.step = 0

        def route(self, exit_layers, num_blocks):
            return Route((1,), num_blocks)

        def leave(self, seen):
            self.step += 1
            return torch.full((len(seen.state_RD),), self.step % 2 == 0)

    from eetrain import MultiExitModel
    from eetrain.testing.tiny import tiny_model

    model = MultiExitModel(tiny_model("llama", eos_token_id=None), ExitConfig(layers=[1])).eval()
    out = model.generate(
        torch.tensor([[5, 6]]), max_new_tokens=5, exit_policy=EveryOther(), return_dict_in_generate=True
    )
    assert out.exit_trace.tolist() == [[4, 4, 1, 4, 1]]
