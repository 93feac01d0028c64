"""Open a model with its tokenizer, on a device, without noise on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers.utils import logging as transformers_logging

from eetrain.checkpoints import open_model
from eetrain.data.tokenization import TextEncoder, load_tokenizer
from eetrain.errors import ConfigError
from eetrain.exits import MultiExitModel


def open_for_decoding(
    path: str, *, dtype: str, device: str, trust_remote_code: bool
) -> tuple[MultiExitModel, TextEncoder]:
    """A model in eval mode and its tokenizer.

    Args:
        path: folder or hub id, with exits or without.
        dtype: see ``load_backbone``.
        device: ``auto`` takes a GPU if there is one.
        trust_remote_code: run code that comes with model or tokenizer.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: no tokenizer, or no such device.
    """
    where = find_device(device)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    model = open_model(path, dtype=dtype, trust_remote_code=trust_remote_code).to(where).eval()
    tokenizer = load_tokenizer(path, trust_remote_code)
    return model, TextEncoder(tokenizer, model.causal_lm.get_input_embeddings().num_embeddings)


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ConfigError: torch does not know the name or has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device={name!r}: {reason}", hint="Set --device to auto, cpu or cuda.") from error
    return torch.device(name)


def unescaped(text: str) -> str:
    r"""A text of the command line, where ``\n``, ``\t`` and ``\\`` stand for newline, tab and backslash."""
    pieces = text.split("\\\\")
    return "\\".join(piece.replace("\\n", "\n").replace("\\t", "\t") for piece in pieces)


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """One value, several or none, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
