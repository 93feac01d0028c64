"""transformers' own self-speculation, ``generate(assistant_early_exit=l)``, as a rival on the same weights.

It drafts with the first ``l`` blocks, the final norm and the output matrix, and verifies with the whole model from its
first block on. Two things it leaves behind: the settings of its drafts are read from, and with one schedule written to,
the model's generation config, whatever ``generate`` is given; and where it fails, the model's config stays cut to
``l`` blocks. So it runs on a shadow with configs of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.utils import logging

from eetrain.decoding import Policy
from eetrain.errors import UnsupportedModelError
from eetrain.evaluation.bench.candidates import Candidate, shadow_with_config

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


@dataclass(frozen=True)
class Drafting:
    """What a speculative policy drafts with.

    Attributes:
        exits: blocks after which it drafts.
        drafts: for each of them, tokens of a draft, ``None`` where no number is fixed.
    """

    exits: tuple[int, ...]
    drafts: tuple[int | None, ...]


def drafting_of(policy: Policy, exit_layers: Sequence[int], num_blocks: int) -> Drafting | None:
    """Exits and draft length of a speculative policy, ``None`` for any other.

    Args:
        policy: if it speculates, with the fields ``exit`` (blocks, or a choice left to it) and ``draft`` (one length,
            or one for each).
        exit_layers: of the model; all below the last block stand for a choice left to the policy.
        num_blocks: of the model.
    """
    if str(policy).partition(":")[0] != "speculative":
        return None
    exits, drafts = getattr(policy, "exit", None), getattr(policy, "draft", None)
    if not isinstance(exits, tuple):
        exits = tuple(layer for layer in exit_layers if layer < num_blocks)
        return Drafting(exits, (None,) * len(exits))
    assert isinstance(drafts, tuple)
    return Drafting(exits, drafts * len(exits) if len(drafts) == 1 else drafts)


def assistant_names(draftings: Sequence[Drafting]) -> dict[str, tuple[int, int | None]]:
    """Name -> exit and draft length of the assistants to time, ``None`` for transformers' own schedule.

    A policy that drafts 4 tokens at exit 3 meets ``assistant:3,draft=4``, which drafts 4 tokens in every round, and
    ``assistant:3`` with transformers' defaults: drafts of up to 20 tokens, ended by the first unsure one.
    """
    names: dict[str, tuple[int, int | None]] = {}
    for drafting in draftings:
        for layer, draft in zip(drafting.exits, drafting.drafts, strict=True):
            names[f"assistant:{layer}"] = layer, None
            if draft is not None:
                names[f"assistant:{layer},draft={draft}"] = layer, draft
    return dict(sorted(names.items(), key=lambda item: (item[1][0], item[1][1] or 0)))


def assistant_baseline(model: MultiExitModel, layer: int, draft: int | None, batch_size: int = 1) -> Candidate:
    """``transformers.generate(assistant_early_exit=layer)``.

    Args:
        model: whose backbone is run.
        layer: drafts are made after this block.
        draft: tokens of every draft; ``None`` for transformers' defaults.
        batch_size: rows it would have to decode together.

    Raises:
        UnsupportedModelError: several rows, or an exit with a head of its own, which it cannot use.
    """
    if batch_size > 1:
        raise UnsupportedModelError("transformers' assisted generation decodes one row at a time", hint="Use batch 1.")
    if layer in model.exit_layers and not _is_tied(model, layer):
        raise UnsupportedModelError(
            f"exit {layer} has a head of its own, and transformers drafts with the final norm and matrix",
            hint="Only exits.head=tied compares.",
        )
    lm = shadow_with_config(model)
    lm.generation_config = copy.deepcopy(lm.generation_config)
    if draft is not None:
        lm.generation_config.num_assistant_tokens = draft
        lm.generation_config.num_assistant_tokens_schedule = "constant"
        lm.generation_config.assistant_confidence_threshold = 0.0
    name = f"assistant:{layer}" + ("" if draft is None else f",draft={draft}")
    return Candidate(name, "assistant", _quiet(lm.generate, layer), model.num_blocks, (layer,))


def _is_tied(model: MultiExitModel, layer: int) -> bool:
    head = model.head(layer)
    return head.inner is None and head.norm is None and head.output is None


def _quiet(generate: Callable[..., Any], layer: int) -> Callable[..., Any]:
    """Without the warnings that transformers gives itself: it calls its own ``generate`` in a deprecated way.

    Its drafts forget a mask of ones and take padding tokens of the prompt for padding, so padding becomes a token that
    no prompt holds; one row needs none.
    """

    def run(ids: Tensor, **kwargs: Any) -> Any:
        present = set(ids.flatten().tolist())
        kwargs["pad_token_id"] = next(token for token in count() if token not in present)
        with _errors_only():
            return generate(ids, assistant_early_exit=layer, **kwargs)

    return run


@contextmanager
def _errors_only() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
