"""All that a run needs, tiny: a backbone, a tokenizer, texts and a configuration, written to a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eetrain.testing.tiny import tiny_model

TEXT = "the cat sat on a mat and dog ran to big red house with blue door under old tree by river"
WORDS = TEXT.split()
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words whose special ids are those of the tiny models."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_texts(path: Path, rows: int, seed: int = 0) -> Path:
    """Write rows of 4 to 12 words as JSONL."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_run(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Write ``model/``, ``train.jsonl``, ``eval.jsonl`` and ``base.yaml``; return the path of the last.

    The configuration trains a float32 model with exits after blocks 1 and 2 for 4 steps into ``folder/run``.

    Args:
        folder: an existing folder.
        family: of the tiny model.
        **changes: to its configuration.
    """
    model, texts = folder / "model", write_texts(folder / "train.jsonl", 24)
    tiny_model(family, dtype=torch.float32, **changes).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    held_out = str(write_texts(folder / "eval.jsonl", 7, seed=1))
    config = {
        "model": {"backbone": {"path": str(model)}, "exits": {"layers": [1, 2]}},
        "data": {
            "tokenizer": str(model),
            "train": str(texts),
            "validation": held_out,
            "test": held_out,
            "predict": held_out,
            "max_length": 16,
            "batch_size": 4,
        },
        "trainer": {"accelerator": "cpu", "max_steps": 4},
        "run": str(folder / "run"),
    }
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
