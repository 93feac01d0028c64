"""Rebuilt parameters in groups of the optimizer of their own: with their own rate, and steps that begin at 0."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def separate(
    optimizer: Optimizer,
    schedule: LambdaLR,
    rebuilt: Container[int],
    lr_factor: float,
    filler: Callable[[dict[str, Any]], nn.Parameter] | None = None,
) -> None:
    """Cut every group into parameters that were not and that were rebuilt, in place.

    The latter keep the schedule's course at a peak of ``lr_factor`` times that of their group, for good: it is made up
    of settings, as all rates are when a run is resumed.

    Args:
        optimizer: before its first step.
        schedule: of its rates.
        rebuilt: identities of parameters.
        lr_factor: of their rates.
        filler: makes a parameter that takes no part, like those of a group, for a half that is empty; without it such
            halves are left out.
    """
    groups, bases, courses = [], [], []
    for group, base, course in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        halves: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in group["params"]:
            halves[id(parameter) in rebuilt].append(parameter)
        for half, ending, factor in zip(halves, ("", "_rebuilt"), (1.0, lr_factor), strict=True):
            if not half and filler is not None:
                half.append(filler(group))
            if half:
                changes = {"params": half, "lr": group["lr"] * factor, "initial_lr": base * factor}
                groups.append({**group, **changes, "name": group["name"] + ending})
                bases.append(base * factor)
                courses.append(course)
    optimizer.param_groups[:] = groups
    schedule.base_lrs, schedule.lr_lambdas = bases, courses
    schedule._last_lr = [group["lr"] for group in groups]
