"""`eetrain generate`: decode prompts and show how deep each token went."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from rich.console import Console
from rich.text import Text

from eetrain.commands.opening import as_list, open_for_decoding, unescaped
from eetrain.commands.output import print_json, progress, stdout
from eetrain.data import read_rows
from eetrain.data.sources import local_files
from eetrain.data.tokenization import TextEncoder
from eetrain.decoding import Policy, parse_policy
from eetrain.errors import ConfigError, DataError
from eetrain.evaluation.batches import generate_options, left_padded
from eetrain.exits import MultiExitModel
from eetrain.viewing import DepthStreamer, Generation, Token, html_page, legend, mean_depth, render_tokens, visible

_RECORDS = (".csv", ".json", ".jsonl", ".parquet")


def generate(
    model: str,
    prompt: str | list[str] | None = None,
    prompts_file: str | None = None,
    policy: str | None = None,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    bos: bool | None = None,
    html: str | None = None,
    json: bool = False,
    color: Literal["auto", "always", "never"] = "auto",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> int:
    r"""Decode prompts with early exits.

    Args:
        model: folder or hub id; a model without exits runs with the policy never.
        prompt: a prompt, or several as '["one", "two"]'; \n, \t and \\ stand for newline, tab and backslash.
        prompts_file: one prompt a line, or the field 'prompt' of a .csv, .json, .jsonl or .parquet file.
        policy: such as never, always:6, threshold:0.9, gate:0.5 or skipdecode:max=9,min=4; by default the one
            stored in the checkpoint, else never.
        max_new_tokens: at most so many tokens a prompt.
        do_sample: draw tokens instead of taking the most likely one.
        temperature: divides the logits when sampling.
        top_p: sample among the most likely tokens that together reach this probability.
        seed: of the sampling.
        batch_size: prompts decoded together.
        bos: start with the tokenizer's bos token; by default if it has one.
        html: write a page with coloured tokens to this file.
        json: write one JSON object with texts, tokens and depths.
        color: colour tokens by depth; auto does so on a terminal.
        dtype: of the weights, auto keeps the stored one.
        device: auto, cpu, cuda, cuda:1...
        trust_remote_code: run code that comes with the checkpoint.
    """
    _check(max_new_tokens, do_sample, temperature, top_p, batch_size)
    prompts = [*map(unescaped, as_list(prompt)), *(_read_prompts(prompts_file) if prompts_file else [])]
    if not prompts:
        raise ConfigError("There is no prompt.", hint="Set --prompt 'text' or --prompts_file FILE.")
    opened, encoder = open_for_decoding(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    chosen = parse_policy(policy or getattr(opened.causal_lm.generation_config, "exit_policy", None) or "never")
    options = generate_options(opened, encoder, max_new_tokens)
    if do_sample:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    torch.manual_seed(seed)
    console = stdout(color)
    if not json and len(prompts) == 1 and _in_colour(console):
        options["streamer"] = DepthStreamer(encoder.tokenizer, partial(_show_token, console, opened.num_blocks))
    generations, seconds = _decode(opened, encoder, prompts, chosen, options, batch_size, bos)
    if html is not None:
        page = html_page(generations, opened.num_blocks, title=Path(model).name, policy=str(chosen), seconds=seconds)
        _write(html, page)
    if json:
        print_json(_as_data(model, chosen, opened.num_blocks, generations, seconds))
    else:
        _show(console, generations, opened.num_blocks, seconds, streamed="streamer" in options)
    return 0


def _check(max_new_tokens: int, do_sample: bool, temperature: float, top_p: float, batch_size: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value}, must be at least 1.", hint="Raise it.")
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"temperature={temperature}, top_p={top_p}: the first must be above 0, the second above 0 and at most 1.",
            hint="Greedy decoding is --do_sample false.",
        )
    if not do_sample and (temperature != 1.0 or top_p != 1.0):
        raise ConfigError(
            f"temperature={temperature}, top_p={top_p} have no effect on greedy decoding.",
            hint="Add --do_sample true.",
        )


def _read_prompts(file: str) -> list[str]:
    path = local_files(file)[0]
    if path.name.removesuffix(".gz").endswith(_RECORDS):
        return [row.text("prompt") for row in read_rows(file)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint="Give a UTF-8 text file.") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompt.", hint="Write one prompt a line.")
    return prompts


def _decode(
    model: MultiExitModel,
    encoder: TextEncoder,
    prompts: Sequence[str],
    policy: Policy,
    options: dict[str, Any],
    batch_size: int,
    bos: bool | None,
) -> tuple[list[Generation], float]:
    ids = [encoder.start_ids(bos) + tokens for tokens in encoder.encode(prompts)]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise ConfigError(f"The prompt {prompt!r} has no tokens.", hint="Write some text, or set --bos true.")
    generations: list[Generation] = []
    seconds = 0.0
    with progress(enabled="streamer" not in options) as on_step:
        for start in range(0, len(prompts), batch_size):
            inputs, mask = left_padded(ids[start : start + batch_size], encoder.pad_id, model.device)
            began = perf_counter()
            output = model.generate(
                inputs, attention_mask=mask, exit_policy=policy, return_dict_in_generate=True, **options
            )
            new, depths = output.sequences[:, inputs.shape[1] :].tolist(), output.exit_trace.tolist()
            seconds += perf_counter() - began
            rows = zip(prompts[start : start + batch_size], new, depths, strict=True)
            generations += [Generation.read(encoder.tokenizer, *row) for row in rows]
            on_step("decoding", len(generations), len(prompts))
    return generations, seconds


def _write(file: str, page: str) -> None:
    try:
        Path(file).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file!r} cannot be written: {error.strerror}.", hint="Set --html to another path."
        ) from error


def _as_data(
    model: str, policy: Policy, num_blocks: int, generations: Sequence[Generation], seconds: float
) -> dict[str, Any]:
    tokens = _all_tokens(generations)
    return {
        "model": model,
        "policy": str(policy),
        "num_blocks": num_blocks,
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
        "mean_depth": mean_depth(tokens),
        "generations": [
            {
                "prompt": generation.prompt,
                "text": generation.text,
                "tokens": [{"id": token.id, "text": token.text} for token in generation.tokens],
                "depths": [token.depth for token in generation.tokens],
                "mean_depth": mean_depth(generation.tokens),
            }
            for generation in generations
        ],
    }


def _all_tokens(generations: Sequence[Generation]) -> list[Token]:
    return [token for generation in generations for token in generation.tokens]


def _in_colour(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def _show_token(console: Console, num_blocks: int, token: Token) -> None:
    console.print(render_tokens([token], num_blocks), end="", soft_wrap=True)


def _show(
    console: Console, generations: Sequence[Generation], num_blocks: int, seconds: float, *, streamed: bool
) -> None:
    if not _in_colour(console):
        for generation in generations:
            console.file.write(generation.text + "\n")
        return
    for generation in generations if not streamed else ():
        if len(generations) > 1:
            console.print(Text(visible(f"> {generation.prompt}"), style="bold"), soft_wrap=True)
        console.print(render_tokens(generation.tokens, num_blocks), soft_wrap=True)
    if streamed:
        console.print()
    console.print(legend(_all_tokens(generations), num_blocks, seconds), soft_wrap=True)
