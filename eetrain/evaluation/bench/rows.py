"""One candidate's numbers at one setting.

Times are milliseconds of a batch: of its prompt's pass, and of one decoding step. A ratio is taken within each round,
and the median of the rounds is reported, so that what slows the machine down for a while cancels out.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    - ``over_dynamic``, ``over_static``, ``over_cut``: how many times faster it decodes than that baseline; ``cut_to``:
      the depth at which the backbone was cut for ``over_cut``, a policy's rounded mean depth;
    - ``step_ms`` and ``prefill_ms`` with ``_min``, ``_q1``, ``_q3``, ``_max``: medians and spread over the rounds;
    - ``tokens_per_second``: of all rows together, decoding only;
    - ``compile_seconds``: by which the first run of ``static`` was longer than the others;
    - ``profile_ms``, ``blocks_ms``, ``heads_ms``, ``harvest_ms``, ``rest_ms``: see ``StepProfile``.
    """
    depth, blocks = _depths(entry, setting)
    cut = entry.first.rounded_depth if entry.first.depths else None
    rivals = {"dynamic": "dynamic", "static": "static", "cut": f"cut:{cut}"}
    ratios = {f"over_{name}": ratio(entry, setting.find(rival)) for name, rival in rivals.items()}
    batches = len(setting.workload.batches)
    decode = median(timing.decode for timing in entry.timings)
    whole = median(timing.prefill + timing.decode for timing in entry.timings)
    return {
        "candidate": entry.candidate.name,
        "kind": entry.candidate.kind,
        "same_tokens": entry.same_tokens,
        "mean_depth": depth,
        "blocks_per_token": blocks,
        "predicted_speedup": num_blocks / blocks,
        **ratios,
        "cut_to": cut if ratios["over_cut"] is not None else None,
        **_spread("step_ms", [1000 * timing.decode / setting.steps for timing in entry.timings]),
        **_spread("prefill_ms", [1000 * timing.prefill / batches for timing in entry.timings]),
        "tokens_per_second": setting.workload.batch_size * setting.steps / decode,
        "compile_seconds": entry.first.seconds - whole if entry.candidate.kind == "static" else None,
        **_profile(entry.profile),
    }


def _depths(entry: Measured, setting: Setting) -> tuple[float, float]:
    """Mean depth and blocks computed, both a token after the first of its row."""
    if entry.first.block_calls is None:
        assert entry.candidate.depth is not None
        return float(entry.candidate.depth), float(entry.candidate.depth)
    tokens = setting.workload.batch_size * setting.steps
    return sum(entry.first.depths) / len(entry.first.depths), entry.first.block_calls / tokens


def ratio(entry: Measured, rival: Measured | None) -> float | None:
    """How many times faster ``entry`` decodes than ``rival``: median over the rounds; ``None`` without a rival."""
    if rival is None or entry is rival:
        return None
    return median(other.decode / own.decode for own, other in zip(entry.timings, rival.timings, strict=True))


def _spread(name: str, values: list[float]) -> dict[str, float]:
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
