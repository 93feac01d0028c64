"""Measured costs of exits, as a configuration for training gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from eetrain.errors import ConfigError
from eetrain.evaluation.bench.report import Benchmark
from eetrain.evaluation.bench.rows import Setting, ratio


def exit_costs(setting: Setting, exit_layers: Sequence[int]) -> dict[int, float]:
    """Exit -> time of a decoding step that always leaves there, over that of the full depth, medians of the rounds.

    Args:
        setting: among its candidates are ``never`` and ``always:l`` for every exit.
        exit_layers: the exits.
    """
    full = setting.find("never")
    costs = {}
    for layer in exit_layers:
        cost = None if full is None else ratio(full, setting.find(f"always:{layer}"))
        assert cost is not None, f"never or always:{layer} was not measured"
        costs[layer] = cost
    return costs


def write_costs(found: Benchmark, path: Path) -> Path:
    """Write the costs of the first setting as a further ``-c`` for :class:`eetrain.objectives.JointGating`.

    Args:
        found: see :func:`exit_costs` for what it holds.
        path: of the YAML file; returned.

    Raises:
        ConfigError: the file cannot be written.
    """
    setting, where = found.measured[0], found.environment
    costs = {layer: round(cost, 4) for layer, cost in exit_costs(setting, found.exit_layers).items()}
    overlay = {"model": {"objective": {"init_args": {"exit_costs": costs}}}}
    machine = where["processor"] if where["device"] == "cpu" else where["device"]
    text = (
        "# What decoding up to each exit costs, the full depth being 1.\n"
        f"# Measured: {machine}, {where['threads']} threads, {where['dtype']}, batch {setting.workload.batch_size}, "
        f"prompt {setting.workload.prompt_length}.\n"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + yaml.safe_dump(overlay), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be written: {error.strerror or error}.", hint="Set --costs to another path."
        ) from error
    return path
