"""The qualities that reports and comparisons know, each from the entries of ``outputs.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eetrain.evaluation.bootstrap import Bootstrap, Resampled, Sums, ratio
from eetrain.evaluation.quality import bleu_sums, exact_match_sums, rouge_l_sums

Entry = Mapping[str, Any]
"""One prompt of a report: see ``Report.outputs``."""


@dataclass(frozen=True)
class Metric:
    """One quality.

    Attributes:
        column: of ``results.csv``.
        title: for people.
        sums: entries and a policy to sums over prompts; ``None`` where the entries have nothing to score.
        lower_is_better: as for a loss.
    """

    column: str
    title: str
    sums: Callable[[Sequence[Entry], str], Sums | None]
    lower_is_better: bool = False


def _of_texts(
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], Sums],
) -> Callable[[Sequence[Entry], str], Sums | None]:
    def sums(entries: Sequence[Entry], policy: str) -> Sums | None:
        if not all(entry["references"] for entry in entries):
            return None
        return score([entry["texts"][policy] for entry in entries], [entry["references"] for entry in entries])

    return sums


def _nll(entries: Sequence[Entry], policy: str) -> Sums | None:
    if policy not in entries[0]["nll_sums"] or not any(entry["reference_tokens"] for entry in entries):
        return None
    return ratio([entry["nll_sums"][policy] for entry in entries], [entry["reference_tokens"] for entry in entries])


METRICS = {
    "bleu": Metric("bleu", "BLEU", _of_texts(bleu_sums)),
    "rouge_l": Metric("rouge_l", "ROUGE-L", _of_texts(rouge_l_sums)),
    "exact_match": Metric("exact_match", "exact match", _of_texts(exact_match_sums)),
    "nll": Metric("reference_nll", "nats per reference token", _nll, lower_is_better=True),
}


def quality_rows(entries: Sequence[Entry], policies: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Every quality of every policy with its interval and its paired difference to a baseline.

    Keys for each metric's column: ``<column>``, ``_low``, ``_high``, ``_delta``, ``_delta_low``, ``_delta_high``;
    also ``reference_tokens``. ``None`` where nothing was measured; ends of intervals also where there is one prompt.
    """
    bootstrap = Bootstrap(len(entries))
    rows: dict[str, dict[str, Any]] = {policy: {} for policy in policies}
    for metric in METRICS.values():
        sums = {policy: metric.sums(entries, policy) for policy in dict.fromkeys((baseline, *policies))}
        found = {policy: None if own is None else bootstrap(own) for policy, own in sums.items()}
        for policy in policies:
            rows[policy] |= _columns(metric.column, found[policy], found[baseline])
    for row in rows.values():
        measured = row["reference_nll"] is not None
        row["reference_tokens"] = sum(entry["reference_tokens"] for entry in entries) if measured else None
    return rows


def _columns(name: str, own: Resampled | None, baseline: Resampled | None) -> dict[str, float | None]:
    keys = [name, *(f"{name}_{end}" for end in ("low", "high", "delta", "delta_low", "delta_high"))]
    if own is None or baseline is None:
        return dict.fromkeys(keys)
    delta = own.minus(baseline)
    return dict(zip(keys, (own.value, *own.interval, delta.value, *delta.interval), strict=True))
