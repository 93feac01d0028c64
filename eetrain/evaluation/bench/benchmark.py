"""Time decoding policies against transformers on the same weights, in one process.

Every candidate runs once a round, so that a machine that slows down slows all of them; ratios are taken within a
round and their median is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from eetrain.decoding import Policy, parse_policy
from eetrain.errors import ConfigError, EETrainError
from eetrain.evaluation.bench.assistant import Drafting, assistant_baseline, assistant_names, drafting_of
from eetrain.evaluation.bench.candidates import (
    Candidate,
    Run,
    cut_baseline,
    dynamic_baseline,
    policy_candidate,
    run_once,
    static_baseline,
)
from eetrain.evaluation.bench.profile import profile_policy
from eetrain.evaluation.bench.prompts import Workload
from eetrain.evaluation.bench.report import Benchmark
from eetrain.evaluation.bench.rows import Measured, Setting
from eetrain.evaluation.environment import environment
from eetrain.evaluation.timing import Timing

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel

BASELINES = ("dynamic", "static", "cut", "assistant")


@dataclass(frozen=True)
class BenchSettings:
    """How to measure.

    Args:
        policies: strings such as ``always:6``.
        new_tokens: every row decodes exactly so many; the first of them belongs to the prompt's pass.
        repeats: timed rounds, after one that is not timed.
        baselines: ``dynamic`` and ``static``: transformers with a growing cache, and with a fixed one and compiled
            steps; ``cut``: with a growing cache on the backbone cut to each policy's mean depth; ``assistant``:
            transformers' self-speculation at the exits of speculative policies, or at all exits without such a
            policy. By default all, ``assistant`` only with a speculative policy.

    Raises:
        ConfigError: nothing to measure, an unknown baseline, or too few tokens or rounds.
    """

    policies: tuple[str, ...]
    new_tokens: int = 48
    repeats: int = 7
    baselines: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.policies:
            raise ConfigError("There is no policy to measure.", hint="For example --policies never,always:6.")
        for name in self.baselines or ():
            if name not in BASELINES:
                raise ConfigError(
                    f"baselines holds {name!r}, which is not known.", hint=f"Any of {_listed(BASELINES)}."
                )
        for name, least in (("new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}, must be at least {least}.", hint="Raise it.")


def run_benchmark(
    model: MultiExitModel,
    workloads: Sequence[Workload],
    settings: BenchSettings,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Benchmark:
    """Measure all policies and baselines at every setting.

    Args:
        model: in eval mode, with its whole backbone.
        workloads: one a setting.
        settings: see there.
        on_step: told what is going on, how many steps of it are done, and of how many.

    Raises:
        ConfigError: a policy does not parse or fit the model, or there are not enough positions.
    """
    policies = {str(policy): policy for policy in map(parse_policy, settings.policies)}
    _check(model, policies, workloads, settings.new_tokens)
    settings = replace(settings, baselines=_baselines(settings, model, policies))
    return Benchmark(
        settings=asdict(settings) | {"policies": list(policies), "baselines": list(settings.baselines or ())},
        environment=environment(model.device) | {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")},
        num_blocks=model.num_blocks,
        exit_layers=model.exit_layers,
        measured=[_measure(model, policies, workload, settings, on_step) for workload in workloads],
    )


def _baselines(settings: BenchSettings, model: MultiExitModel, policies: dict[str, Policy]) -> tuple[str, ...]:
    if settings.baselines is not None:
        return settings.baselines
    speculates = any(map(partial(_drafting, model), policies.values()))
    return tuple(name for name in BASELINES if name != "assistant" or speculates)


def _drafting(model: MultiExitModel, policy: Policy) -> Drafting | None:
    return drafting_of(policy, model.exit_layers, model.num_blocks)


def _check(model: MultiExitModel, policies: dict[str, Policy], workloads: Sequence[Workload], new_tokens: int) -> None:
    if not model.full_depth_loaded:
        raise ConfigError("The model was loaded without its full depth.", hint="Load the whole backbone (depth=None).")
    for policy in policies.values():
        policy.check(model)
    limit = getattr(model.causal_lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(workload.prompt_length for workload in workloads)
    if limit is not None and longest + new_tokens > limit:
        raise ConfigError(
            f"Prompts of {longest} and {new_tokens} new tokens make {longest + new_tokens}, but the model has {limit} "
            "positions.",
            hint="Lower --prompt_lengths or --new_tokens.",
        )


def _measure(
    model: MultiExitModel,
    policies: dict[str, Policy],
    workload: Workload,
    settings: BenchSettings,
    on_step: Callable[[str, int, int], None],
) -> Setting:
    """One setting: everything once without the clock, then the rounds, then the profiles."""
    decode = partial(run_once, workload=workload, new_tokens=settings.new_tokens)
    what = f"batch {workload.batch_size}, prompt {workload.prompt_length}"
    reference = decode(dynamic_baseline(model))
    first, unavailable = _first_runs(model, policies, settings.baselines or (), workload, decode)
    timings: dict[str, list[Timing]] = {name: [] for name in first}
    order: list[str] = []
    for _ in range(settings.repeats):
        for name, (candidate, _) in first.items():
            timings[name].append(decode(candidate).timing)
            order.append(name)
            on_step(what, len(order), settings.repeats * len(first))
    profiles = {name: profile_policy(model, policy, workload, settings.new_tokens) for name, policy in policies.items()}
    return Setting(
        workload,
        settings.new_tokens,
        order,
        unavailable,
        [
            Measured(candidate, run, timings[name], _same(run, reference), profiles.get(name))
            for name, (candidate, run) in first.items()
        ],
    )


def _first_runs(
    model: MultiExitModel,
    policies: dict[str, Policy],
    baselines: Sequence[str],
    workload: Workload,
    decode: Callable[[Candidate], Run],
) -> tuple[dict[str, tuple[Candidate, Run]], dict[str, str]]:
    """What can be timed, with its first run, and why the rest cannot."""
    runs: dict[str, tuple[Candidate, Run]] = {}
    unavailable: dict[str, str] = {}

    def add(candidate: Candidate) -> None:
        runs[candidate.name] = candidate, decode(candidate)

    if "dynamic" in baselines:
        add(dynamic_baseline(model))

    def attempt(name: str, baseline: Callable[[], Candidate]) -> None:
        try:
            add(baseline())
        except Exception as error:
            # Compilers and models fail in many ways, and whatever it was, the others can still be timed.
            unavailable[name] = _reason(error)

    if "static" in baselines:
        attempt("static", partial(static_baseline, model))
    if "assistant" in baselines:
        assistants = _assistants(model, policies)
        if not assistants:
            unavailable["assistant"] = "the model has no exits to draft at"
        for name, (layer, draft) in assistants.items():
            attempt(name, partial(assistant_baseline, model, layer, draft, workload.batch_size))
    for policy in policies.values():
        drafting = _drafting(model, policy)
        add(policy_candidate(model, policy, () if drafting is None else drafting.exits))
    if "cut" in baselines:
        lossy = [run for _, run in runs.values() if run.depths and run.speculation is None]
        for depth in sorted({run.rounded_depth for run in lossy} - {model.num_blocks}):
            add(cut_baseline(model, depth))
    return runs, unavailable


def _assistants(model: MultiExitModel, policies: dict[str, Policy]) -> dict[str, tuple[int, int | None]]:
    found = [drafting for drafting in map(partial(_drafting, model), policies.values()) if drafting is not None]
    everywhere = tuple(layer for layer in model.exit_layers if layer < model.num_blocks)
    return assistant_names(found or [Drafting(everywhere, (None,) * len(everywhere))])


def _same(run: Run, reference: Run) -> bool:
    return all(torch.equal(own, other) for own, other in zip(run.tokens, reference.tokens, strict=True))


def _reason(error: Exception) -> str:
    text = error.message if isinstance(error, EETrainError) else str(error)
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
