"""One flat row a policy and one an exit, as they stand in ``results.json`` and ``results.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from statistics import median
from typing import Any

from eetrain.evaluation.agreement import DepthScore
from eetrain.evaluation.depth import summarise_depths
from eetrain.evaluation.outputs import Outputs


def policy_row(
    policy: str,
    qualities: Mapping[str, Any],
    output: Outputs,
    reference: Outputs,
    full_depth_agreement: float,
) -> dict[str, Any]:
    """One policy's numbers.

    Keys, ``None`` where there is nothing to measure:

    - ``bleu`` and ``rouge_l`` (0 to 100) and ``exact_match`` (a share) against the references, ``reference_nll`` in
      nats per token of the first reference; each with its interval (``_low``, ``_high``) and its paired difference to
      ``never`` with interval (``_delta``, ``_delta_low``, ``_delta_high``), see ``metrics.quality_rows``;
    - ``full_depth_agreement``: share of its tokens that the full depth would choose after the same text;
    - ``same_as_never``: share of prompts whose whole output is that of ``never``;
    - ``tokens``, ``mean_depth``, ``depth_p10``, ``depth_p50``, ``depth_p90``: see ``DepthSummary``; the first token
      of a text counts with the depth of the prompt's pass;
    - ``blocks_per_token``: blocks computed after the prompt, repair and rejected drafts included, over the steps that
      computed them;
    - ``acceptance``, ``tokens_per_round``: see ``Speculation``; of speculative policies only;
    - ``prefill_seconds``, ``decode_seconds``: medians over the timed passes of the sum over all prompts;
    - ``decode_tokens_per_second``: tokens after each first one by ``decode_seconds``;
    - ``tokens_per_second``: all tokens by both times; ``speedup``: of decoding, over ``never``;
    - ``share_at_<depth>``: share of tokens with this depth.
    """
    depths = summarise_depths([depth for row in output.depths for depth in row])
    steps = depths.tokens - len(output.tokens)
    same = [own == other for own, other in zip(output.tokens, reference.tokens, strict=True)]
    return {
        "policy": policy,
        **qualities,
        "full_depth_agreement": full_depth_agreement,
        "same_as_never": sum(same) / len(same),
        "tokens": depths.tokens,
        "mean_depth": depths.mean,
        "depth_p10": depths.p10,
        "depth_p50": depths.p50,
        "depth_p90": depths.p90,
        "blocks_per_token": output.block_calls / steps if steps else None,
        "acceptance": _known(output.speculation.acceptance) if output.speculation else None,
        "tokens_per_round": _known(output.speculation.tokens_per_round) if output.speculation else None,
        **_speeds(output, reference),
        **{f"share_at_{depth}": share for depth, share in depths.shares.items()},
    }


def _known(value: float) -> float | None:
    return None if isnan(value) else value


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
