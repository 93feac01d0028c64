"""`eetrain bench`: decoding speed of exit policies next to transformers on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from eetrain.commands.bench_table import show_benchmark
from eetrain.commands.opening import as_list, open_for_decoding
from eetrain.commands.output import print_json, progress
from eetrain.commands.policies import split_policies
from eetrain.commands.templates import chosen_template
from eetrain.data import Template, Text
from eetrain.data.tokenization import TextEncoder
from eetrain.errors import ConfigError
from eetrain.evaluation.bench.benchmark import BenchSettings, run_benchmark
from eetrain.evaluation.bench.costs import write_costs
from eetrain.evaluation.bench.prompts import Workload, random_prompts, real_prompts
from eetrain.evaluation.samples import read_samples
from eetrain.exits import MultiExitModel


def bench(
    model: str,
    policies: str | list[str] | None = None,
    batch_sizes: str | list[int] = "1,8",
    prompt_lengths: str | list[int] = "32",
    new_tokens: int = 48,
    repeats: int = 7,
    threads: int | None = None,
    baselines: str | list[str] | None = None,
    data: str | list[str] | None = None,
    template: Template | None = None,
    prompt: str | None = None,
    response: str | None = None,
    limit: int | None = None,
    costs: str | None = None,
    out: str | None = None,
    json: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> int:
    r"""Measure decoding speed: policies against transformers.generate, all candidates in turn, in one process.

    Args:
        model: folder or hub id; a model without exits is measured with the policy never.
        policies: such as never,always:6,threshold:0.9 or a list; by default never and each exit.
        batch_sizes: rows decoded together, such as 1,8,32.
        prompt_lengths: tokens of the prompts, such as 32,256; prompts with a template have their own.
        new_tokens: each row decodes exactly so many; the first comes from the prompt's pass.
        repeats: timed rounds, after one that is not timed.
        threads: of torch; its own choice if left out.
        baselines: of dynamic, static (static cache, compiled), cut (the backbone cut to a policy's mean depth) and
            assistant (transformers' assistant_early_exit, batch 1); by default all of them, assistant only with a
            speculative policy.
        data: take real prompts from these files, patterns or hub:name@config#split; by default ids are random.
        template: how rows become prompts, as for training; plain text gives the first tokens of each document.
        prompt: instead of a template: the prompt with {field} for fields; \n, \t, \\ are newline, tab, backslash.
        response: instead of a template: the response, likewise.
        limit: take at most this many prompts; by default as many as the largest batch.
        costs: write the time of each exit relative to the full depth, from the first setting, as a configuration
            for training (a further -c) to this YAML file.
        out: folder for bench.json and bench.csv.
        json: write one JSON object.
        dtype: of the weights, auto keeps the stored one.
        device: auto, cpu, cuda, cuda:1...
        trust_remote_code: run code that comes with the checkpoint.
    """
    sizes, lengths = _numbers("batch_sizes", batch_sizes), _numbers("prompt_lengths", prompt_lengths)
    rivals = None if baselines is None else _names(baselines)
    chosen = _prompt_source(data, template, prompt, response, limit)
    opened, encoder = open_for_decoding(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    wanted = split_policies(policies) or _default_policies(opened)
    settings = BenchSettings(tuple(wanted + (_for_costs(opened) if costs else [])), new_tokens, repeats, rivals)
    if data is None:
        workloads = _random(opened, sizes, lengths)
    else:
        workloads = _real(opened, encoder, data, chosen, sizes, lengths, limit)
    with _threads(threads), progress() as on_step:
        found = run_benchmark(opened, workloads, settings, on_step)
    found = found.with_settings({"model": model, "data": as_list(data)})
    files = [str(path) for path in found.write(out)] if out is not None else []
    if costs is not None:
        files.append(str(write_costs(found, Path(costs))))
    if json:
        print_json({**found.to_dict(), "files": files})
    else:
        show_benchmark(found)
    return 0


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _names(given: str | list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for text in as_list(given) for name in _parts(text)))


def _numbers(name: str, given: str | list[int]) -> list[int]:
    parts = _parts(given) if isinstance(given, str) else [str(number) for number in given]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{name}={given!r} is no list of positive numbers.", hint=f"For example --{name} 1,8,32.")
    return list(dict.fromkeys(map(int, parts)))


def _prompt_source(
    data: str | list[str] | None, template: Template | None, prompt: str | None, response: str | None, limit: int | None
) -> Template:
    settings = {"template": template, "prompt": prompt, "response": response, "limit": limit}
    idle = [name for name, value in settings.items() if value is not None]
    if data is None and idle:
        raise ConfigError(f"--{idle[0]} is set, but there is no data.", hint="Set --data FILE, or leave it out.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}, must be at least 1.", hint="Leave it out for one largest batch.")
    return chosen_template(template, prompt, response)


def _default_policies(model: MultiExitModel) -> list[str]:
    return ["never", *(f"always:{layer}" for layer in model.exit_layers if layer < model.num_blocks)]


def _for_costs(model: MultiExitModel) -> list[str]:
    if not model.exit_layers:
        raise ConfigError("--costs is set, but the model has no exits.", hint="Give a multi-exit checkpoint.")
    return ["never", *(f"always:{layer}" for layer in model.exit_layers)]


def _random(model: MultiExitModel, sizes: list[int], lengths: list[int]) -> list[Workload]:
    vocabulary = model.causal_lm.get_input_embeddings().num_embeddings
    return [random_prompts(vocabulary, size, length, model.device) for size in sizes for length in lengths]


def _real(
    model: MultiExitModel,
    encoder: TextEncoder,
    data: str | list[str],
    template: Template,
    sizes: list[int],
    lengths: list[int],
    limit: int | None,
) -> list[Workload]:
    most = max(sizes) if limit is None else limit
    starts = lengths if isinstance(template, Text) else [None]
    samples = [read_samples(data, template, encoder, limit=most, prompt_tokens=length) for length in starts]
    return [real_prompts(taken, size, encoder.pad_id, model.device) for size in sizes for taken in samples]


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    if number is not None and number < 1:
        raise ConfigError(f"threads={number}, must be at least 1.", hint="Leave it out for torch's own choice.")
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
