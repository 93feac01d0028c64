import math

import pytest
import torch
from torch import nn

from eetrain.errors import ConfigError
from eetrain.training.optimization import build_adamw, build_schedule, lr_factor, parameter_groups
from eetrain.training.settings import OptimizerConfig


def factors(schedule, steps, **settings):
    return [lr_factor(step, schedule=schedule, **settings) for step in steps]


def test_warmup_counts_from_one_share_to_the_peak():
    assert factors("constant", range(5), warmup=4, total=9, floor=0.1) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_goes_straight_to_the_floor_and_stays():
    got = factors("linear", [2, 4, 6, 10, 50], warmup=2, total=10, floor=0.2)
    assert got == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])


def test_cosine_is_half_a_cosine():
    got = factors("cosine", [2, 4, 6, 10, 50], warmup=2, total=10, floor=0.2)
    quarter = 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert got == pytest.approx([1.0, quarter, 0.6, 0.2, 0.2])


def named_parameters():
    return [
        ("model.backbone.a.weight", nn.Parameter(torch.zeros(2, 2))),
        ("model.backbone.a.bias", nn.Parameter(torch.zeros(2))),
        ("model.backbone.frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False)),
        ("model.exits.1.norm.weight", nn.Parameter(torch.zeros(2))),
        ("model.exits.1.output.weight", nn.Parameter(torch.zeros(2, 2))),
        ("model.gates.1.output.weight", nn.Parameter(torch.zeros(2, 2))),
        ("model.gates.1.output.bias", nn.Parameter(torch.zeros(2))),
    ]


def test_groups_decay_matrices_only_and_scale_the_rates_of_exits_and_gates():
    named = named_parameters()
    config = OptimizerConfig(lr=0.5, weight_decay=0.3, exits_lr_multiplier=4.0, gates_lr_multiplier=6.0)
    groups = parameter_groups(named, config)
    found = {id(p): (g["name"], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert [found.get(id(p)) for _, p in named] == [
        ("backbone", 0.5, 0.3),
        ("backbone", 0.5, 0.0),
        None,
        ("exits", 2.0, 0.0),
        ("exits", 2.0, 0.3),
        ("gates", 3.0, 0.3),
        ("gates", 3.0, 0.0),
    ]


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match=r"nothing to train.*HINT: Set model.exits.head to norm"):
        parameter_groups([("model.backbone.x", nn.Parameter(torch.zeros(1), requires_grad=False))], OptimizerConfig())


def rates(config, run_steps, steps):
    optimizer = build_adamw(named_parameters(), config)
    schedule = build_schedule(optimizer, config, run_steps)
    course = []
    for _ in range(steps):
        course.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return course


def test_schedule_spans_the_run_with_a_warmup_share():
    config = OptimizerConfig(lr=1.0, schedule="linear", warmup_fraction=0.25, min_lr_ratio=0.0)
    assert rates(config, 8, 9) == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])


def test_schedule_steps_override_the_length_of_the_run():
    config = OptimizerConfig(lr=1.0, schedule="linear", schedule_steps=2, min_lr_ratio=0.5)
    assert rates(config, math.inf, 4) == pytest.approx([1.0, 0.75, 0.5, 0.5])


def test_an_endless_run_has_no_schedule():
    config = OptimizerConfig(schedule="cosine")
    with pytest.raises(ConfigError, match=r"schedule=cosine .* the run has no end.*trainer.max_steps"):
        build_schedule(build_adamw(named_parameters(), config), config, math.inf)
    assert rates(OptimizerConfig(lr=1.0, warmup_steps=2), math.inf, 3) == [0.5, 1.0, 1.0]
