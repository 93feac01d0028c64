"""One candidate's numbers at one setting.

Times are milliseconds of a batch: of its prompt's pass, and of one decoding step. A ratio is taken within each round,
and the median of the rounds is reported, so that what slows the machine down for a while cancels out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from statistics import median, quantiles
from typing import Any

from eetrain.evaluation.bench.candidates import Candidate, Run
from eetrain.evaluation.bench.profile import StepProfile
from eetrain.evaluation.bench.prompts import Workload
from eetrain.evaluation.timing import Timing


@dataclass(frozen=True)
class Measured:
    """One candidate at one setting.

    Attributes:
        candidate: what decoded.
        first: its first run, which is not timed: compilation falls into it.
        timings: one a round.
        same_tokens: whether its tokens are those of ``transformers.generate`` on the whole backbone.
        profile: where a step goes; of policies only.
    """

    candidate: Candidate
    first: Run
    timings: list[Timing]
    same_tokens: bool
    profile: StepProfile | None


@dataclass(frozen=True)
class Setting:
    """One batch size and prompt length.

    Attributes:
        workload: what was decoded.
        new_tokens: a row.
        order: names of the candidates as the timed runs followed each other.
        unavailable: baselines that could not run, with the reason.
        measured: one entry a candidate.
    """

    workload: Workload
    new_tokens: int
    order: list[str]
    unavailable: dict[str, str]
    measured: list[Measured]

    @property
    def steps(self) -> int:
        """Decoding steps of all batches, each of which feeds one token a row."""
        return (self.new_tokens - 1) * len(self.workload.batches)

    def find(self, name: str) -> Measured | None:
        """The candidate of that name, if it was measured."""
        return next((entry for entry in self.measured if entry.candidate.name == name), None)

    def sizes(self) -> dict[str, int]:
        """The setting in numbers."""
        return {
            "batch_size": self.workload.batch_size,
            "prompt_length": self.workload.prompt_length,
            "batches": len(self.workload.batches),
            "new_tokens": self.new_tokens,
        }


def bench_row(entry: Measured, setting: Setting, num_blocks: int) -> dict[str, Any]:
    """One candidate's numbers.

    Keys, ``None`` where there is nothing to tell:

    - ``candidate``, ``kind`` and ``same_tokens``: see ``Candidate`` and ``Measured``;
    - ``mean_depth``: of the tokens after each row's first; ``blocks_per_token``: blocks computed for them, repair
      included; ``predicted_speedup``: all blocks by that, what decoding would gain if blocks were all it cost;
    - ``acceptance``, ``tokens_per_round``, ``rounds``: of a speculative policy: accepted drafts by those that
      verification came to, tokens a round and row, rounds of all batches. It has no ``predicted_speedup``: it verifies
      several positions at once and computes blocks for drafts that are thrown away, so blocks say little about time;
    - ``over_dynamic``, ``over_static``, ``over_cut``: how many times faster it decodes than that baseline; ``cut_to``:
      the depth at which the backbone was cut for ``over_cut``, a policy's rounded mean depth;
    - ``over_assistant``: times faster than transformers' self-speculation, prompt's pass included, with the faster of
      its schedules, at the exits a policy drafts at or at any; ``assistant``: which one that was;
    - ``step_ms`` and ``prefill_ms`` with ``_min``, ``_q1``, ``_q3``, ``_max``: medians and spread over the rounds;
    - ``tokens_per_second``: of all rows together, decoding only;
    - ``compile_seconds``: by which the first run of ``static`` was longer than the others;
    - ``profile_ms``, ``blocks_ms``, ``heads_ms``, ``harvest_ms``, ``rest_ms``: see ``StepProfile``.
    """
    depth, blocks = _depths(entry, setting)
    drafts = entry.first.speculation
    predicted = None if blocks is None or drafts is not None else num_blocks / blocks
    cut = entry.first.rounded_depth if entry.first.depths and drafts is None else None
    assistant = _fastest_assistant(entry, setting)
    rivals = {"dynamic": "dynamic", "static": "static", "cut": f"cut:{cut}"}
    ratios = {f"over_{name}": ratio(entry, setting.find(rival)) for name, rival in rivals.items()}
    ratios["over_assistant"] = ratio(entry, assistant)
    batches = len(setting.workload.batches)
    steps = [timing.decode / (setting.steps - timing.ahead) for timing in entry.timings if timing.ahead < setting.steps]
    whole = median(timing.prefill + timing.decode for timing in entry.timings)
    return {
        "candidate": entry.candidate.name,
        "kind": entry.candidate.kind,
        "same_tokens": entry.same_tokens,
        "mean_depth": depth,
        "blocks_per_token": blocks,
        "predicted_speedup": predicted,
        **{name: _known(getattr(drafts, name, None)) for name in ("acceptance", "tokens_per_round", "rounds")},
        **ratios,
        "cut_to": cut if ratios["over_cut"] is not None else None,
        "assistant": None if assistant is None or assistant is entry else assistant.candidate.name,
        **_spread("step_ms", [1000 * seconds for seconds in steps]),
        **_spread("prefill_ms", [1000 * timing.prefill / batches for timing in entry.timings]),
        "tokens_per_second": setting.workload.batch_size / median(steps) if steps else None,
        "compile_seconds": entry.first.seconds - whole if entry.candidate.kind == "static" else None,
        **_profile(entry.profile),
    }


def _known(value: float | None) -> float | None:
    """``None`` where nothing was judged."""
    return None if value is None or isnan(value) else value


def _depths(entry: Measured, setting: Setting) -> tuple[float, float | None]:
    """Mean depth and blocks computed, both a token after the first of its row."""
    if entry.first.block_calls is None:
        assert entry.candidate.depth is not None
        depth = float(entry.candidate.depth)
        return depth, None if entry.candidate.drafts_at else depth
    tokens = setting.workload.batch_size * setting.steps
    return sum(entry.first.depths) / len(entry.first.depths), entry.first.block_calls / tokens


def ratio(entry: Measured, rival: Measured | None) -> float | None:
    """How many times faster ``entry`` decodes than ``rival``: median over the rounds; ``None`` without a rival.

    With transformers' self-speculation on either side the prompt's pass counts as well: there its end is not seen,
    since the first tokens come out after the first drafts are verified.
    """
    if rival is None or entry is rival:
        return None
    whole = "assistant" in (entry.candidate.kind, rival.candidate.kind)
    pairs = zip(entry.timings, rival.timings, strict=True)
    if whole:
        return median((other.prefill + other.decode) / (own.prefill + own.decode) for own, other in pairs)
    return median(other.decode / own.decode for own, other in pairs)


def _fastest_assistant(entry: Measured, setting: Setting) -> Measured | None:
    """The assistant that ``entry`` has to beat: of those at the exits it drafts at, if it drafts."""
    exits = entry.candidate.drafts_at
    rivals = [
        other
        for other in setting.measured
        if other.candidate.kind == "assistant" and (not exits or other.candidate.drafts_at[0] in exits)
    ]
    return min(rivals, key=lambda other: median(t.prefill + t.decode for t in other.timings), default=None)


def _spread(name: str, values: list[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys((name, *(f"{name}_{part}" for part in ("min", "q1", "q3", "max"))))
    q1, middle, q3 = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        name: middle,
        f"{name}_min": min(values),
        f"{name}_q1": q1,
        f"{name}_q3": q3,
        f"{name}_max": max(values),
    }


def _profile(profile: StepProfile | None) -> dict[str, float | None]:
    names = {"profile_ms": "total", "blocks_ms": "blocks", "heads_ms": "heads", "harvest_ms": "harvest"}
    names["rest_ms"] = "rest"
    return {key: None if profile is None else getattr(profile, name) for key, name in names.items()}
