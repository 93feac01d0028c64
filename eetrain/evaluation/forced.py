"""How likely given texts are under a policy: their tokens are fed through the decoding run itself.

Teacher forcing in one pass (:mod:`eetrain.evaluation.agreement`) gives the likelihood under one exit. A policy mixes
depths, and what a token skipped changes the keys and values that later tokens see; so here the prompt is run, then
the reference token by token, each at the depth that the policy gives it. The sum of ``-log p`` of the reference's
tokens is then exactly the likelihood with which sampling under the policy would write the reference.

Shape suffixes: ``B`` rows still running, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from eetrain.decoding import Never, Policy, parse_policy, start
from eetrain.decoding.runner import StepRunner
from eetrain.evaluation.agreement import precise
from eetrain.evaluation.batches import left_padded
from eetrain.evaluation.samples import Sample

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


@dataclass(frozen=True)
class ReferenceScore:
    """The reference of one prompt under a policy.

    Attributes:
        nll: sum of the negative log-likelihoods of its tokens, in nats.
        tokens: how many tokens were scored.
    """

    nll: float
    tokens: int


def forced_nll(
    model: MultiExitModel,
    policy: str | Policy,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    pad_id: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> list[ReferenceScore]:
    """Score the first reference of every prompt under a policy.

    Args:
        model: in eval mode.
        policy: decides depths.
        samples: prompts with their references; one reference is enough for a mean and costs one decoding pass.
        batch_size: rows run together.
        pad_id: any id of the vocabulary.
        on_batch: called after each batch.

    Returns:
        One score a sample; zero nats on zero tokens where the reference has no scored token.
    """
    rows = [_row(sample) for sample in samples]
    sums = [0.0] * len(rows)
    for first in range(0, len(rows), batch_size):
        places = [place for place in range(first, min(first + batch_size, len(rows))) if rows[place].given]
        if places:
            found = _batch(model, policy, [rows[place] for place in places], pad_id)
            for place, nll in zip(places, found, strict=True):
                sums[place] = nll
        on_batch()
    return [ReferenceScore(nll, sum(row.scored)) for nll, row in zip(sums, rows, strict=True)]


@dataclass(frozen=True)
class _Row:
    """A prompt, the tokens given after it, up to the last one scored, and which of them are scored."""

    prompt: list[int]
    given: list[int]
    scored: list[bool]


def _row(sample: Sample) -> _Row:
    example = sample.examples[0]
    end = max((place + 1 for place, scored in enumerate(example.scored) if scored), default=0)
    start_of_given = max(len(sample.prompt_ids), 1)  # the first token of all has nothing before it to predict it
    return _Row(example.ids[:start_of_given], example.ids[start_of_given:end], list(example.scored[start_of_given:end]))


def _batch(model: MultiExitModel, policy: str | Policy, rows: Sequence[_Row], pad_id: int) -> list[float]:
    ids, mask = left_padded([row.prompt for row in rows], pad_id, model.device)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    sums = [0.0] * len(rows)
    running, place = list(range(len(rows))), 0
    with torch.inference_mode():
        run = start(model, _fed(policy), ids, attention_mask=mask, position_ids=positions)
        assert isinstance(run, StepRunner)
        logits_BV, _ = run.prefill()
        while True:
            tokens = torch.tensor([rows[row].given[place] for row in running], device=model.device)
            for row, nll in zip(running, _nll(logits_BV, tokens), strict=True):
                sums[row] += nll if rows[row].scored[place] else 0.0
            place += 1
            going = [at for at, row in enumerate(running) if place < len(rows[row].given)]
            if not going:
                return sums
            if len(going) < len(running):
                run.keep(going)
                running, tokens = [running[at] for at in going], tokens[going]
            logits_BV, _ = run.step(tokens)


def _fed(policy: str | Policy) -> Policy:
    """The policy for given tokens: one that loses nothing gives them the full depth's likelihood."""
    given = parse_policy(policy)
    return Never() if given.lossless else given


def _nll(logits_BV: Tensor, tokens_B: Tensor) -> list[float]:
    values: list[float] = F.cross_entropy(precise(logits_BV), tokens_B, reduction="none").tolist()
    return values
