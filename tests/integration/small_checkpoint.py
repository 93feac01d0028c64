"""A 4-block model with a byte-level tokenizer, small enough to be written in every test session."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.testing.tiny import tiny_model

VOCABULARY = 270


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one two three first second third"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


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
