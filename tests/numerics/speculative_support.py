"""Tiny models whose exits often agree with the full depth, and what self-speculation must equal on them."""

from __future__ import annotations

from functools import cache

import torch
from families_support import Sequences as Forced
from families_support import dtype_of, full_cache, perturb, positions_of
from transformers import set_seed

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import blocks_of
from eetrain.decoding.speculation.runner import SpeculativeRunner
from eetrain.testing.tiny import tiny_model

UNTIED = {"gemma": {"tie_word_embeddings": False}}
LENGTHS = (9, 4, 7, 9, 5, 8, 1, 6)


@cache
def agreeing(family: str, head: str = "norm", calm: float = 0.5) -> MultiExitModel:
    """Exits after blocks 1, 2 and 3 of 4; blocks 2 to 4 say little, so that drafts stand now and then."""
    backbone = tiny_model(family, dtype=dtype_of(family), eos_token_id=None, **UNTIED.get(family, {}))
    model = MultiExitModel(backbone, ExitConfig(layers=[1, 2, 3], head=head)).eval()
    with torch.no_grad():
        if family == "gemma":  # multiplies its embeddings so much that blocks would have no say
            backbone.get_input_embeddings().weight.mul_(0.05)
        for block in blocks_of(backbone, model.anatomy)[1:]:
            for name, parameter in block.named_parameters():
                if parameter.dim() > 1 or name.endswith("bias"):
                    parameter.mul_(calm)
    if head != "tied":
        perturb(model.exits, scale=0.02)
    return model


def prompts(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = LENGTHS[:rows]
    ids = torch.randint(3, 61, (rows, max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length], mask[row, : max(lengths) - length] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def decoded(model: MultiExitModel, policy: str, rows: int, new: int = 20, **options):
    """Greedy tokens under a policy, with everything there is to know about them."""
    set_seed(3)
    if model.causal_lm.config.model_type == "gpt2":
        options = {"repetition_penalty": 1.3, **options}  # would write one token again and again
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    return model.generate(**prompts(rows), exit_policy=policy, return_dict_in_generate=True, **options)


@torch.inference_mode()
def rounds(model: MultiExitModel, policy, rows: int, new: int, after_round) -> SpeculativeRunner:
    """Run rounds by hand until every row has ``new`` tokens."""
    from eetrain.decoding import parse_policy

    batch = prompts(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    runner = SpeculativeRunner(model, parse_policy(policy), ids, mask, positions_of(mask))
    logits, _ = runner.prefill()
    runner.feed(logits.float().argmax(-1))
    while min(runner.rows.complete) < ids.shape[1] + new:
        runner.round([max(1, ids.shape[1] + new - complete) for complete in runner.rows.complete])
        after_round(runner)
    return runner


def check_cache(model: MultiExitModel, runner: SpeculativeRunner) -> None:
    """Keys and values of all complete slots are those of one forward over the row's tokens alone."""
    start = runner.prompt_slots
    for row, complete in enumerate(runner.rows.complete):
        real = runner.rows.visible[row, :start]
        ids = torch.cat([runner.rows.ids[row, :start][real], runner.rows.ids[row, start:complete]])[None]
        mask = torch.ones_like(ids)
        truth = full_cache(model, Forced(ids, mask, positions_of(mask), ids.shape[1]))
        for block in range(model.num_blocks):
            mine, theirs = runner.cache.layers[block], truth.layers[block]
            for ours, full in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                got = torch.cat([ours[row, :, :start][:, real], ours[row, :, start:complete]], dim=1)
                tolerance = 1e-9 if got.dtype == torch.float64 else 1e-4
                torch.testing.assert_close(got, full[0], rtol=0, atol=tolerance)
