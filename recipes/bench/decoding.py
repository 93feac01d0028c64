"""Time decoding against transformers on the same weights: medians of interleaved repeats, one process.

    python recipes/bench/decoding.py MODEL --layer 6 --batches 1 8 32

`never` is compared with `transformers.generate`; `always:LAYER` with `transformers.generate` on the backbone cut to
LAYER blocks, its final norm and output matrix kept. The last columns say where a step of `never` goes.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import blocks_of


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model = MultiExitModel.attach(args.model, ExitConfig(layers=[args.layer], head="tied")).eval()
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {model.num_blocks} blocks, {next(model.parameters()).dtype}")
    print(f"{args.prompt} prompt tokens, {args.new} new, median of {args.repeats} (min..max), ms per step")
    for batch in args.batches:
        report(model, batch, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=30)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def report(model: MultiExitModel, batch: int, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, model.anatomy.vocab_size, (batch, args.prompt), generator=generator)
    settings = {
        "max_new_tokens": args.new,
        "min_new_tokens": args.new,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    full, cut = model.causal_lm, cut_to(model, args.layer)
    always = f"always:{args.layer}"
    candidates: dict[str, Callable[[], Any]] = {
        "transformers": lambda: full.generate(ids, **settings),
        "never": lambda: model.generate(ids, exit_policy="never", **settings),
        f"transformers cut to {args.layer}": lambda: cut.generate(ids, **settings),
        always: lambda: model.generate(ids, exit_policy=always, **settings),
    }
    for ours, theirs in (("transformers", "never"), (f"transformers cut to {args.layer}", always)):
        assert torch.equal(candidates[ours](), candidates[theirs]()), f"{ours} and {theirs} differ"
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(args.repeats):
        for name, run in candidates.items():
            times[name].append(1000 * seconds(run) / args.new)
    print(f"batch {batch}")
    for name, values in times.items():
        print(f"  {name:<28}{statistics.median(values):8.2f}  ({min(values):.2f}..{max(values):.2f})")
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"  never is {middle['transformers'] / middle['never']:.2f} x transformers; ", end="")
    print(f"{always} is {middle[f'transformers cut to {args.layer}'] / middle[always]:.2f} x the cut backbone")
    inside = inside_blocks_and_heads(model, candidates["never"], batch, args.new)
    total = 1000 * seconds(candidates["never"]) / args.new
    print(f"  outside blocks and heads: {total - 1000 * inside / args.new:.2f} of {total:.2f} ms per step of never")


def cut_to(model: MultiExitModel, layer: int) -> Any:
    cut = copy.deepcopy(model.causal_lm)
    del blocks_of(cut, model.anatomy)[layer:]
    cut.config.num_hidden_layers = layer
    return cut


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def inside_blocks_and_heads(model: MultiExitModel, run: Callable[[], Any], batch: int, new_tokens: int) -> float:
    """Seconds one run spends in blocks, final norm and output matrix (the latter two timed alone)."""
    spent, started = 0.0, 0.0

    def before(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(*_: Any) -> None:
        nonlocal spent
        spent += time.perf_counter() - started

    norm, projection = model.shared_tail()
    handles = []
    for module in (*blocks_of(model.backbone, model.anatomy), norm):
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    run()
    for handle in handles:
        handle.remove()
    state = torch.randn(batch, 1, model.anatomy.hidden_size, dtype=projection.weight.dtype)
    with torch.no_grad():
        matrix = statistics.median(seconds(lambda: projection(state)) for _ in range(50))
    return spent + new_tokens * matrix


if __name__ == "__main__":
    main()
