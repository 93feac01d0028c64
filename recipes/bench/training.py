"""Time a training step with and without exits, beside transformers' own and what floating-point operations predict.

    python recipes/bench/training.py --exits 3

A random Llama is trained on random tokens, the whole of it, with exits at equal distances (norm heads, tied matrix).
Predicted is the ratio of the matrix operations counted by torch's flop counter in both steps; measured is the ratio
of the medians of interleaved steps. Chunked cross-entropy counts its products with the output matrix in full.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones.loading import fresh_backbone
from eetrain.objectives import MultiExitCrossEntropy


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    models = {0: build(args, 0), args.exits: build(args, args.exits)}
    ids = torch.randint(0, args.vocab, (args.batch, args.length))
    flops, times, theirs = {}, {count: [] for count in models}, []
    plain_step(models[0], ids)
    for count, model in models.items():
        step(model, ids)
        with FlopCounterMode(display=False) as counter:
            step(model, ids)
        flops[count] = counter.get_total_flops()
    for _ in range(args.repeats):
        for count, model in models.items():
            start = time.perf_counter()
            step(model, ids)
            times[count].append(time.perf_counter() - start)
        start = time.perf_counter()
        plain_step(models[0], ids)
        theirs.append(time.perf_counter() - start)
    middle = {count: statistics.median(values) for count, values in times.items()}
    predicted = flops[args.exits] / flops[0]
    measured = middle[args.exits] / middle[0]
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, float32, hidden {args.hidden}, {args.blocks} blocks, ", end="")
    print(f"vocabulary {args.vocab}, {args.batch} x {args.length} tokens, {args.repeats} repeats")
    for count, values in times.items():
        spread = f"({min(values):.3f}..{max(values):.3f})"
        print(f"{count} exits: {middle[count]:.3f} s {spread}, {flops[count] / 1e9:.1f} GFLOP")
    plain = statistics.median(theirs)
    print(f"transformers' own loss: {plain:.3f} s; without exits eetrain takes {middle[0] / plain:.2f} of that")
    print(f"predicted {predicted:.3f} x, measured {measured:.3f} x, measured/predicted {measured / predicted:.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "exits": 3,
        "hidden": 256,
        "blocks": 8,
        "vocab": 4096,
        "batch": 4,
        "length": 256,
        "repeats": 9,
        "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def build(args: argparse.Namespace, exits: int) -> tuple[MultiExitModel, MultiExitCrossEntropy]:
    backbone = fresh_backbone(
        {
            "model_type": "llama",
            "hidden_size": args.hidden,
            "intermediate_size": 11 * args.hidden // 4,
            "num_hidden_layers": args.blocks,
            "num_attention_heads": args.hidden // 64,
            "vocab_size": args.vocab,
            "max_position_embeddings": args.length,
            "tie_word_embeddings": True,
        }
    )
    layers = [args.blocks * place // (exits + 1) for place in range(1, exits + 1)]
    model = MultiExitModel(backbone, ExitConfig(layers=layers))
    objective = MultiExitCrossEntropy(weights=0.5)
    objective.bind(model.exit_layers, model.num_blocks)
    return model, objective


def step(pair: tuple[MultiExitModel, MultiExitCrossEntropy], ids: torch.Tensor) -> None:
    model, objective = pair
    model.zero_grad(set_to_none=True)
    objective(model(ids), ids, step=0).total.backward()


def plain_step(pair: tuple[MultiExitModel, MultiExitCrossEntropy], ids: torch.Tensor) -> None:
    model, _ = pair
    model.zero_grad(set_to_none=True)
    model.causal_lm(input_ids=ids, labels=ids).loss.backward()


if __name__ == "__main__":
    main()
