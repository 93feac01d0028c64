"""What the scripts beside this one share: a checkpoint with exits, prompts from a file, a line about the machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eetrain import ExitConfig, MultiExitModel
from eetrain.commands.opening import open_for_decoding
from eetrain.commands.templates import chosen_template
from eetrain.data.tokenization import TextEncoder
from eetrain.errors import ConfigError
from eetrain.evaluation import Sample, environment, read_samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id; tied exits that it lacks are added")
    parser.add_argument("--data", required=True, help="CSV or JSONL with the prompts")
    parser.add_argument("--prompt", required=True, help=r"such as '{mr}\n=> '; \n, \t, \\ are newline, tab, backslash")
    parser.add_argument("--response", required=True, help="such as '{ref}'; rows with an equal prompt are one prompt")
    parser.add_argument("--limit", type=int, default=None, help="take the first so many prompts")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own choice if left out")
    parser.add_argument("--dtype", default="auto", help="of the weights; auto keeps the stored one")


def opened(args: argparse.Namespace, exits: Sequence[int]) -> tuple[MultiExitModel, TextEncoder, list[Sample]]:
    """The model with these exits at least, its tokenizer, the prompts.

    Tied exits have nothing of their own, so a model that has only such gets those that it lacks.

    Raises:
        ConfigError: it lacks some and has heads of its own.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, encoder = open_for_decoding(args.model, dtype=args.dtype, device="cpu", trust_remote_code=False)
    missing = sorted(set(exits) - {*model.exit_layers})
    if missing and model.exit_layers and model.config.head != "tied":
        raise ConfigError(
            f"The model has no exit after block {missing[0]}, and its heads are of kind {model.config.head}.",
            hint=f"Exits stand after blocks {', '.join(map(str, model.exit_layers))}.",
        )
    if missing:
        model = MultiExitModel(model.backbone, ExitConfig(sorted({*exits, *model.exit_layers}), head="tied")).eval()
    samples = read_samples(args.data, chosen_template(None, args.prompt, args.response), encoder, limit=args.limit)
    return model, encoder, samples


def numbers(text: str) -> list[int]:
    """Read ``3,6``."""
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def machine(model: MultiExitModel) -> str:
    where = environment()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    versions = where["versions"]
    return (
        f"{where['processor']}, {where['cores']} cores, {where['threads']} threads, {dtype}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}"
    )


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
