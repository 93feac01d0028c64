"""A 4-block model with a byte-level tokenizer, small enough to be written in every test session."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.testing.byte_level import byte_tokenizer
from eetrain.testing.tiny import tiny_model

VOCABULARY = 270


def small_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(VOCABULARY, ["one two three first second third"] * 4)


def write_checkpoint(folder: Path, exit_policy: str | None = None) -> Path:
    """With exits after blocks 1 and 2."""
    backbone = tiny_model("llama", vocab_size=VOCABULARY, dtype=torch.float32)
    model = MultiExitModel(backbone, ExitConfig(layers=[1, 2]))
    return model.save_pretrained(folder, tokenizer=small_tokenizer(), exit_policy=exit_policy)


def write_plain(folder: Path) -> Path:
    """Without exits."""
    tiny_model("llama", vocab_size=VOCABULARY, dtype=torch.float32).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
