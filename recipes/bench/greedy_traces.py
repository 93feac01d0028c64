"""A checkpoint's own greedy texts, and what its exits make of every token of them.

Ranks come from one teacher-forced pass a text. Rollouts, which leave the text with their first wrong draft, are
decoded from every start of every text with `always:l`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from losslessness import until_end
from mirror_model import Rollout, Text
from torch import Tensor

from eetrain import MultiExitModel
from eetrain.data.tokenization import TextEncoder
from eetrain.evaluation import Sample
from eetrain.evaluation.batches import generate_options, left_padded


def traces(
    model: MultiExitModel,
    encoder: TextEncoder,
    samples: Sequence[Sample],
    draft_exits: Sequence[int],
    *,
    gamma: int,
    width: int,
    new_tokens: int,
    batch_size: int = 64,
) -> list[Text]:
    """Texts of the prompts with ranks at all exits.

    Args:
        model: in eval mode.
        encoder: of the model.
        samples: the prompts.
        draft_exits: exits to roll out from.
        gamma: drafts of a rollout.
        width: guesses kept a draft.
        new_tokens: of a text, at most.
        batch_size: rows decoded together.
    """
    prompts = [sample.prompt_ids for sample in samples]
    texts = greedy_texts(model, encoder, prompts, new_tokens, batch_size)
    rolled = {}
    for layer in draft_exits:
        print(f"rollouts of exit {layer}", file=sys.stderr)
        rolled[layer] = all_rollouts(model, encoder, prompts, texts, layer, gamma, width, batch_size)
    return [
        Text(tuple(text), ranks(model, prompt, text), {layer: rows[number] for layer, rows in rolled.items()})
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def greedy_texts(
    model: MultiExitModel, encoder: TextEncoder, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int
) -> list[list[int]]:
    options = generate_options(model, encoder, new_tokens)
    ends = options.get("eos_token_id", model.causal_lm.generation_config.eos_token_id)
    texts: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = left_padded(prompts[start : start + batch_size], encoder.pad_id, model.device)
        rows = model.generate(ids, attention_mask=mask, exit_policy="never", **options)
        texts += [until_end(row[ids.shape[1] :], ends) for row in rows]
    return texts


@torch.inference_mode()
def ranks(model: MultiExitModel, prompt: Sequence[int], text: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Exit, and the full depth under its number of blocks -> ranks of the text's tokens, 0 the best."""
    output = model(torch.tensor([[*prompt, *text]], device=model.device))
    true_N1 = torch.tensor(text, device=model.device)[:, None]
    found = {}
    for layer in (*model.exit_layers, None):
        logits_NV = model.logits(output, layer)[0, len(prompt) - 1 : -1]
        above_N = (logits_NV > logits_NV.gather(1, true_N1)).sum(-1)
        found[layer or model.num_blocks] = tuple(above_N.tolist())
    return found


def all_rollouts(
    model: MultiExitModel,
    encoder: TextEncoder,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    layer: int,
    gamma: int,
    width: int,
    batch_size: int,
) -> list[tuple[Rollout, ...]]:
    starts = [[*p, *text[:start]] for p, text in zip(prompts, texts, strict=True) for start in range(len(text))]
    found: list[Rollout] = []
    for first in range(0, len(starts), batch_size):
        ids, mask = left_padded(starts[first : first + batch_size], encoder.pad_id, model.device)
        found += rollouts(model, ids, mask, layer, gamma, width, encoder.pad_id)
    rows = iter(found)
    return [tuple(next(rows) for _ in text) for text in texts]


def rollouts(
    model: MultiExitModel, ids: Tensor, mask: Tensor, layer: int, gamma: int, width: int, pad_id: int
) -> list[Rollout]:
    """Rollouts do not stop at ends of text: what comes after one is never right, as texts stop there."""
    no_token = model.causal_lm.get_input_embeddings().num_embeddings
    output = model.generate(
        ids,
        attention_mask=mask,
        exit_policy=f"always:{layer}",
        do_sample=False,
        max_new_tokens=gamma,
        eos_token_id=no_token,
        pad_token_id=pad_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack([logits.softmax(-1).topk(width).values for logits in output.logits], 1)[..., 0].tolist()
    guesses = torch.stack([logits.topk(width).indices for logits in output.logits], 1).tolist()
    return [Rollout(tuple(map(tuple, rows)), tuple(sure)) for rows, sure in zip(guesses, best, strict=True)]
