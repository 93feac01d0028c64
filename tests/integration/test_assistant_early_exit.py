"""An export whose exits share the last norm drafts for transformers' own self-speculation, too."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import blocks_of
from eetrain.testing.tiny import tiny_model


def exported(folder: Path) -> MultiExitModel:
    """Blocks behind the first exit say little, as training with exit losses makes them."""
    backbone = tiny_model("llama", eos_token_id=None, dtype=torch.float32)
    model = MultiExitModel(backbone, ExitConfig(layers=[1, 2], head="tied")).eval()
    with torch.no_grad():
        for block in blocks_of(backbone, model.anatomy)[1:]:
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.3)
    model.save_pretrained(folder)
    return model


def test_transformers_drafts_with_the_exits_of_an_export(tmp_path):
    model = exported(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    want = plain.generate(ids, **options)
    calls = []
    plain.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    got = plain.generate(ids, assistant_early_exit=1, **options)
    assert torch.equal(got, want)
    assert len(calls) < 20, "the last block must run less often than once a token: drafts stand"
    ours = model.generate(ids, exit_policy="speculative:exit=1,draft=4", return_dict_in_generate=True, **options)
    assert torch.equal(ours.sequences, want)
    assert ours.speculation.accepted > 0
