"""`eetrain generate`: decode prompts and show how deep each token went."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from eetrain.commands.decoding import Decoder
from eetrain.commands.opening import as_list, open_for_decoding, unescaped
from eetrain.commands.output import print_json, stdout
from eetrain.commands.prompts import read_prompts
from eetrain.commands.self_generated import SelfGenerated
from eetrain.decoding import Policy, parse_policy
from eetrain.errors import ConfigError
from eetrain.evaluation.batches import generate_options
from eetrain.viewing import DepthStreamer, Generation, Token, html_page, legend, mean_depth, render_tokens, visible


def generate(
    model: str,
    prompt: str | list[str] | None = None,
    prompts_file: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    policy: str | None = None,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    bos: bool | None = None,
    html: str | None = None,
    out: str | None = None,
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
        prompts_file: one prompt a line, or one a record of a .csv, .json, .jsonl or .parquet file.
        template: how a record becomes a prompt, such as '{mr}\n=> '; by default '{prompt}'.
        limit: take at most so many prompts of the file.
        policy: such as never, speculative:exit=3,draft=4, always:6, threshold:0.9, gate:0.5 or
            skipdecode:max=9,min=4; by default the one stored in the checkpoint, else never.
        max_new_tokens: at most so many tokens a prompt.
        do_sample: draw tokens instead of taking the most likely one.
        temperature: divides the logits when sampling.
        top_p: sample among the most likely tokens that together reach this probability.
        seed: of the sampling.
        batch_size: prompts decoded together.
        bos: start with the tokenizer's bos token; by default if it has one.
        html: write a page with coloured tokens to this file.
        out: write prompts and responses to this .jsonl file, to train exits on what the model says; equal prompts
            once, unless do_sample. A command that was stopped goes on if it is given again.
        json: write one JSON object with texts, tokens and depths.
        color: colour tokens by depth; auto does so on a terminal.
        dtype: of the weights, auto keeps the stored one.
        device: auto, cpu, cuda, cuda:1...
        trust_remote_code: run code that comes with the checkpoint.
    """
    _check(max_new_tokens, do_sample, temperature, top_p, batch_size, limit)
    if html is not None and out is not None:
        raise ConfigError("html shows texts and out keeps them for training.", hint="Set one of the two.")
    prompts = _all_prompts(prompt, prompts_file, template, limit)
    opened, encoder = open_for_decoding(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    chosen = parse_policy(policy or getattr(opened.causal_lm.generation_config, "exit_policy", None) or "never")
    options = generate_options(opened, encoder, max_new_tokens)
    if do_sample:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    decoder = Decoder(opened, encoder, chosen, options, batch_size, bos, seed)
    if out is not None:
        _keep(out, model, decoder, prompts if do_sample else list(dict.fromkeys(prompts)), json=json)
        return 0
    console = stdout(color)
    if not json and len(prompts) == 1 and _in_colour(console):
        options["streamer"] = DepthStreamer(encoder.tokenizer, partial(_show_token, console, opened.num_blocks))
    batches = list(decoder.batches(prompts))
    generations = [generation for batch, _ in batches for generation in batch]
    seconds = sum(took for _, took in batches)
    if html is not None:
        page = html_page(generations, opened.num_blocks, title=Path(model).name, policy=str(chosen), seconds=seconds)
        _write(html, page)
    if json:
        print_json(_as_data(model, chosen, opened.num_blocks, generations, seconds))
    else:
        _show(console, generations, opened.num_blocks, seconds, streamed="streamer" in options)
    return 0


def _check(
    max_new_tokens: int, do_sample: bool, temperature: float, top_p: float, batch_size: int, limit: int | None
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
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


def _all_prompts(
    prompt: str | list[str] | None, file: str | None, template: str | None, limit: int | None
) -> list[str]:
    if file is None and (template is not None or limit is not None):
        raise ConfigError("template and limit are of a file, and there is none.", hint="Set --prompts_file FILE.")
    prompts = [*map(unescaped, as_list(prompt)), *(read_prompts(file, template, limit) if file else [])]
    if not prompts:
        raise ConfigError("There is no prompt.", hint="Set --prompt 'text' or --prompts_file FILE.")
    return prompts


def _keep(out: str, model: str, decoder: Decoder, prompts: Sequence[str], *, json: bool) -> None:
    found = SelfGenerated(out, {"model": model, **decoder.settings}).write(decoder, prompts)
    if json:
        print_json({"policy": str(decoder.policy), "num_blocks": decoder.model.num_blocks, **found})
    else:
        sys.stdout.write(f"{found['texts']} texts in {found['out']}\n")


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
                "drafted_by": [token.drafted_by for token in generation.tokens],
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
