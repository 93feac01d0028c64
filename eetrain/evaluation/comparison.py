"""Several report folders as one: all checkpoints and policies against one baseline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eetrain.decoding import parse_policy
from eetrain.errors import ConfigError, DataError
from eetrain.evaluation.bootstrap import Bootstrap, Resampled, described
from eetrain.evaluation.metrics import METRICS, Metric
from eetrain.evaluation.settings import REFERENCE
from eetrain.evaluation.stored import StoredReport, check_same_prompts, read_report

_TIMINGS = ("decode_tokens_per_second", "speedup")


@dataclass(frozen=True)
class Comparison:
    """Checkpoints and policies side by side.

    Attributes:
        metric: its name.
        baseline: name of the checkpoint and policy that differences are taken to.
        prompts: how many there are.
        reports: every folder that was read, with what was measured where.
        rows: one flat row a checkpoint and policy, see :func:`compare_reports`.
    """

    metric: str
    baseline: tuple[str, str]
    prompts: int
    reports: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    @property
    def quality(self) -> Metric:
        """What the column ``quality`` holds."""
        return METRICS[self.metric]

    def to_dict(self) -> dict[str, Any]:
        """What ``comparison.json`` holds."""
        return {
            "metric": self.metric,
            "lower_is_better": self.quality.lower_is_better,
            "baseline": ":".join(self.baseline),
            "prompts": self.prompts,
            "intervals": described(self.prompts),
            "reports": self.reports,
            "rows": self.rows,
        }


def compare_reports(
    given: Sequence[tuple[str, str]], metric: str = "bleu", baseline: str | None = None, skip: int = 0
) -> Comparison:
    """Put report folders together.

    Rows hold ``model`` (the name given), ``policy``, ``quality`` with ``low`` and ``high``; the paired difference to
    the baseline as ``delta`` with ``delta_low`` and ``delta_high``, ``delta_percent`` of the baseline's quality and
    ``share_worse`` of the resamples in which it is worse; ``mean_depth``, ``blocks_per_token``,
    ``decode_tokens_per_second`` and ``speedup`` over ``never`` of the same checkpoint. ``None`` where not measured.

    Args:
        given: names and folders. The first folder under a name gives texts and depths; further ones under the same
            name give the times, and may have been measured on fewer prompts. They then replace the first one's.
        metric: a key of ``METRICS``.
        baseline: ``NAME:POLICY``, or a name for its ``never``; the first name's ``never`` if left out.
        skip: leave out the first so many prompts, on which thresholds were chosen, say; ``blocks_per_token`` and times
            stay those of all prompts.

    Raises:
        ConfigError: the metric or the baseline is not there, or no prompt is left.
        DataError: a folder is no report, reports differ in their prompts, or they lack the metric.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} is not known.", hint=f"One of: {', '.join(METRICS)}.")
    groups: dict[str, list[StoredReport]] = {}
    for name, folder in given:
        groups.setdefault(name, []).append(read_report(name, folder))
    reports = [group[0] for group in groups.values()]
    for other in reports[1:]:
        check_same_prompts(reports[0], other)
    _leave_out(skip, reports)
    if metric == "nll":
        _check_same_tokens(reports)
    wanted = _found(baseline, reports)
    qualities = _qualities(reports, METRICS[metric], metric)
    costs = {name: _costs(group) for name, group in groups.items()}
    return Comparison(
        metric,
        wanted,
        len(reports[0].entries),
        [_described(report) for group in groups.values() for report in group],
        [
            {
                "model": name,
                "policy": policy,
                **_quality_columns(own, qualities[wanted], METRICS[metric]),
                **costs[name][policy],
            }
            for (name, policy), own in qualities.items()
        ],
    )


def _qualities(reports: Sequence[StoredReport], metric: Metric, name: str) -> dict[tuple[str, str], Resampled]:
    bootstrap = Bootstrap(len(reports[0].entries))
    found = {}
    for report in reports:
        for policy in report.rows:
            sums = metric.sums(report.entries, policy)
            if sums is None:
                hint = (
                    "Evaluate it again with --likelihood."
                    if name == "nll"
                    else "Its prompts have no references; use --metric nll."
                )
                raise DataError(f"{report.name}: the report in {report.folder!r} holds no {name}.", hint=hint)
            found[report.name, policy] = bootstrap(sums)
    return found


def _quality_columns(own: Resampled, baseline: Resampled, metric: Metric) -> dict[str, float | None]:
    difference = own.minus(baseline)
    (low, high), (delta_low, delta_high) = own.interval, difference.interval
    return {
        "quality": own.value,
        "low": low,
        "high": high,
        "delta": difference.value,
        "delta_low": delta_low,
        "delta_high": delta_high,
        "delta_percent": 100 * difference.value / baseline.value if baseline.value else None,
        "share_worse": difference.share_worse(lower_is_better=metric.lower_is_better),
    }


def _costs(group: Sequence[StoredReport]) -> dict[str, dict[str, float | None]]:
    """Depths from the first report, times from the others if there are any."""
    first, *others = group
    times: dict[str, dict[str, Any]] = {}
    for report in others or [first]:
        if others and not report.timed:
            raise DataError(
                f"{report.name}: the second report, in {report.folder!r}, holds no times.",
                hint="Evaluate it with --repeats above 0, or give it a name of its own.",
            )
        unknown = sorted(set(report.rows) - set(first.rows))
        if unknown:
            warnings.warn(
                f"{report.name}: times of {', '.join(unknown)} in {report.folder!r} are left out, as {first.folder!r} "
                "does not hold the quality of these policies.",
                stacklevel=3,
            )
        times |= {policy: row for policy, row in report.rows.items() if policy in first.rows}
    return {
        policy: {
            "mean_depth": _mean_depth(first, policy),
            "blocks_per_token": row["blocks_per_token"],
            **{name: times[policy][name] if policy in times else None for name in _TIMINGS},
        }
        for policy, row in first.rows.items()
    }


def _leave_out(skip: int, reports: Sequence[StoredReport]) -> None:
    have = len(reports[0].entries)
    if not 0 <= skip < have:
        raise ConfigError(
            f"skip={skip} of {have} prompts.", hint="Leave out fewer prompts than there are, or none with 0."
        )
    for report in reports:
        del report.entries[:skip]


def _mean_depth(report: StoredReport, policy: str) -> float:
    depths = sum(entry["depth_sums"][policy] for entry in report.entries)
    return float(depths / sum(entry["tokens"][policy] for entry in report.entries))


def _found(baseline: str | None, reports: Sequence[StoredReport]) -> tuple[str, str]:
    """Name and policy of the baseline."""
    if baseline is None:
        return reports[0].name, REFERENCE
    name, _, policy = baseline.partition(":")
    by_name = {report.name: report for report in reports}
    if name in by_name:
        policy = policy or REFERENCE
        policies = by_name[name].rows
        if policy not in policies:
            policy = str(parse_policy(policy))
        if policy in policies:
            return name, policy
    known = [f"{report.name}:{policy}" for report in reports for policy in report.rows]
    raise ConfigError(f"baseline={baseline!r} is not there.", hint=f"One of: {', '.join(known)}.")


def _check_same_tokens(reports: Sequence[StoredReport]) -> None:
    """Nats per token compare only between tokenizers that cut the references alike."""
    first = reports[0]
    for other in reports[1:]:
        if [entry["reference_tokens"] for entry in first.entries] != [
            entry["reference_tokens"] for entry in other.entries
        ]:
            raise DataError(
                f"{first.name} and {other.name} do not cut the references into the same numbers of tokens, or one of "
                "them was evaluated without --likelihood, so their nats per token do not compare.",
                hint="Use --metric bleu, rouge_l or exact_match, or evaluate both with --likelihood.",
            )


def _described(report: StoredReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "folder": report.folder,
        "num_blocks": report.results["num_blocks"],
        "settings": report.results["settings"],
        "environment": report.results["environment"],
    }
