"""Results as rows, files and a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from eetrain.errors import ConfigError
from eetrain.evaluation.agreement import DepthScore
from eetrain.evaluation.depth import summarise_depths
from eetrain.evaluation.frontier import FrontierPoint, draw_frontier
from eetrain.evaluation.outputs import Outputs
from eetrain.evaluation.quality import bleu, exact_match
from eetrain.evaluation.samples import Sample

FORMAT = 1


@dataclass(frozen=True)
class Report:
    """All that was measured, as plain data.

    Attributes:
        settings: what was asked for.
        environment: where it was measured.
        num_blocks: of the model.
        policies: one flat row a policy, see :func:`policy_row`.
        exits: one flat row an exit, the full depth last, see :func:`exit_row`.
        timings: seconds of every timed pass.
        outputs: one entry a prompt: its references and every policy's text.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    num_blocks: int
    policies: list[dict[str, Any]]
    exits: list[dict[str, Any]]
    timings: dict[str, list[dict[str, float]]]
    outputs: list[dict[str, Any]]

    def with_settings(self, settings: dict[str, Any]) -> Report:
        """The same results with more settings beside those of the run."""
        return replace(self, settings={**settings, **self.settings})

    @property
    def quality(self) -> tuple[str, str]:
        """Column and name of the quality that the frontier shows."""
        if self.policies[0]["bleu"] is not None:
            return "bleu", "BLEU"
        return "full_depth_agreement", "tokens the full depth would choose (%)"

    def to_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds: everything but the texts."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "environment": self.environment,
            "num_blocks": self.num_blocks,
            "policies": self.policies,
            "exits": self.exits,
            "timings": self.timings,
        }

    def points(self) -> list[FrontierPoint]:
        """The policies as points of the frontier."""
        column, _ = self.quality
        factor = 1.0 if column == "bleu" else 100.0
        return [
            FrontierPoint(row["policy"], factor * row[column], row["blocks_per_token"], row["decode_tokens_per_second"])
            for row in self.policies
        ]

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``results.json``, ``results.csv``, ``outputs.jsonl`` and ``frontier.png``; return their paths.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        folder = Path(folder)
        paths = [folder / name for name in ("results.json", "results.csv", "outputs.jsonl", "frontier.png")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths[0].write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            _write_csv(paths[1], self.policies)
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.outputs)
            paths[2].write_text("".join(lines), encoding="utf-8")
            draw_frontier(self.points(), paths[3], quality=self.quality[1], num_blocks=self.num_blocks)
        except OSError as error:
            raise ConfigError(
                f"The results cannot be written to {str(folder)!r}: {error.strerror or error}.",
                hint="Set --out to a folder that you may write to.",
            ) from error
        return paths


def policy_row(
    policy: str,
    output: Outputs,
    reference: Outputs,
    texts: Sequence[str],
    samples: Sequence[Sample],
    full_depth_agreement: float,
) -> dict[str, Any]:
    """One policy's numbers.

    Keys, ``None`` where there is nothing to measure:

    - ``bleu`` (0 to 100) and ``exact_match`` against the references;
    - ``full_depth_agreement``: share of its tokens that the full depth would choose after the same text;
    - ``same_as_never``: share of prompts whose whole output is that of ``never``;
    - ``tokens``, ``mean_depth``, ``depth_p10``, ``depth_p50``, ``depth_p90``: see ``DepthSummary``; the first token
      of a text counts with the depth of the prompt's pass;
    - ``blocks_per_token``: blocks computed after the prompt, repair included, over the steps that computed them;
    - ``prefill_seconds``, ``decode_seconds``: medians over the timed passes of the sum over all prompts;
    - ``decode_tokens_per_second``: tokens after each first one by ``decode_seconds``;
    - ``tokens_per_second``: all tokens by both times; ``speedup``: of decoding, over ``never``;
    - ``share_at_<depth>``: share of tokens with this depth.
    """
    depths = summarise_depths([depth for row in output.depths for depth in row])
    steps = depths.tokens - len(output.tokens)
    scored = all(sample.references for sample in samples)
    references = [sample.references for sample in samples]
    same = [own == other for own, other in zip(output.tokens, reference.tokens, strict=True)]
    return {
        "policy": policy,
        "bleu": bleu(texts, references) if scored else None,
        "exact_match": exact_match(texts, references) if scored else None,
        "full_depth_agreement": full_depth_agreement,
        "same_as_never": sum(same) / len(same),
        "tokens": depths.tokens,
        "mean_depth": depths.mean,
        "depth_p10": depths.p10,
        "depth_p50": depths.p50,
        "depth_p90": depths.p90,
        "blocks_per_token": output.block_calls / steps if steps else None,
        **_speeds(output, reference),
        **{f"share_at_{depth}": share for depth, share in depths.shares.items()},
    }


def _speeds(output: Outputs, reference: Outputs) -> dict[str, float | None]:
    names = ("prefill_seconds", "decode_seconds", "decode_tokens_per_second", "tokens_per_second", "speedup")
    if not output.timings:
        return dict.fromkeys(names)
    prefill = median(timing.prefill for timing in output.timings)
    decode = median(timing.decode for timing in output.timings)
    speed, before = _decode_speed(output), _decode_speed(reference)
    tokens = sum(map(len, output.tokens))
    ratio = speed / before if speed is not None and before is not None else None
    return dict(zip(names, (prefill, decode, speed, tokens / (prefill + decode), ratio), strict=True))


def _decode_speed(output: Outputs) -> float | None:
    steps = sum(map(len, output.tokens)) - len(output.tokens)
    return steps / median(timing.decode for timing in output.timings) if steps else None


def exit_row(own: DepthScore, given: DepthScore, num_blocks: int) -> dict[str, Any]:
    """One exit's numbers, both with the text given (teacher forcing).

    Keys: ``exit`` (block, or ``full``), ``agreement`` with the full depth on its own greedy output and the number of
    ``agreement_tokens``; ``reference_nll`` (nats a token), ``reference_accuracy``, ``reference_tokens``.
    """
    return {
        "exit": "full" if own.layer is None else own.layer,
        "depth": num_blocks if own.layer is None else own.layer,
        "agreement": own.agreement,
        "agreement_tokens": own.tokens,
        "reference_nll": given.nll,
        "reference_accuracy": given.accuracy,
        "reference_tokens": given.tokens,
    }


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    shares = sorted({key for row in rows for key in row if key.startswith("share_at_")}, key=lambda key: int(key[9:]))
    columns = [key for key in rows[0] if key not in shares] + shares
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval=0.0)
        writer.writeheader()
        writer.writerows(rows)
