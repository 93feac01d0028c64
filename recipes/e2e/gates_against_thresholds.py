"""Do trained gates know more than chance, and more than the best fixed threshold at the same mean depth?

    python recipes/e2e/gates_against_thresholds.py GATED --against NAME=OTHER ... --data DEV.csv \\
        --prompt '{mr}\\n=> ' --response '{ref}' --tune 180 --out FOLDER

Teacher-forced on all references of the prompts. For every cost weight: the negative log-likelihood of the references
when each token is taken from the exit its gate chooses; the same with the choices shuffled across tokens (same depths,
no knowledge); and with the best of three confidence measures under one threshold, set on the first `--tune` prompts to
the mean depth of the gates there. All is reported on the other prompts, with intervals of the paired bootstrap.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eetrain import MultiExitModel
from eetrain.data import PromptResponse
from eetrain.data.tokenization import Example, TextEncoder, load_tokenizer
from eetrain.evaluation import read_samples
from eetrain.evaluation.bootstrap import Bootstrap, ratio
from eetrain.exits.gating import chosen_exit
from eetrain.objectives import score
from eetrain.objectives.linear_ce import IGNORE_INDEX, shift_labels

SHUFFLES = 20
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda features: features[..., 0],
    "margin": lambda features: features[..., 2],
    "entropy": lambda features: -features[..., 1],
}


@dataclass
class Tokens:
    """Every reference token of every prompt, ``N`` in all, at ``E`` depths, the last the full one.

    Attributes:
        depths_E: blocks.
        nll_EN: negative log-likelihood.
        features_EN4: gate inputs.
        gates_KNG: gate outputs, none for a model without gates.
        prompt_N: which prompt it belongs to.
    """

    depths_E: Tensor
    nll_EN: Tensor
    features_EN4: Tensor
    gates_KNG: Tensor
    prompt_N: Tensor

    def part(self, keep_N: Tensor) -> Tokens:
        return Tokens(
            self.depths_E,
            self.nll_EN[:, keep_N],
            self.features_EN4[:, keep_N],
            self.gates_KNG[:, keep_N],
            self.prompt_N[keep_N],
        )

    def nll_at(self, places_N: Tensor) -> Tensor:
        return self.nll_EN.gather(0, places_N[None])[0]

    def mean_depth(self, places_N: Tensor) -> float:
        return float(self.depths_E[places_N].float().mean())

    def choice(self, measure: str, threshold: float) -> Tensor:
        return chosen_exit(MEASURES[measure](self.features_EN4[:-1]).t() > threshold)


def collect(model: MultiExitModel, encoder: TextEncoder, samples: Sequence[Any], batch: int) -> Tokens:
    """Run the model over all references once."""
    examples = [(number, example) for number, sample in enumerate(samples) for example in sample.examples]
    nll, features, gates, prompts = [], [], [], []
    for start in range(0, len(examples), batch):
        rows = examples[start : start + batch]
        ids_BT, mask_BT, labels_BT = padded([example for _, example in rows], encoder.pad_id)
        with torch.inference_mode():
            output = model(ids_BT, mask_BT)
            statistics, _ = score(output, labels_BT)
        valid_N = shift_labels(labels_BT) != IGNORE_INDEX
        nll.append(statistics.nll[:, valid_N])
        columns = (statistics.max_prob, statistics.entropy, statistics.margin, statistics.sharp_entropy)
        features.append(torch.stack([column[:, valid_N] for column in columns], dim=-1))
        index_BT = (labels_BT != IGNORE_INDEX).long().cumsum(1)
        gates.append(gate_outputs(model, features[-1], index_BT.flatten()[valid_N]))
        numbers = torch.tensor([number for number, _ in rows])
        prompts.append(numbers[:, None].expand_as(labels_BT).flatten()[valid_N])
    return Tokens(
        torch.tensor([*model.exit_layers, model.num_blocks]),
        torch.cat(nll, 1),
        torch.cat(features, 1),
        torch.cat(gates, 1),
        torch.cat(prompts),
    )


def gate_outputs(model: MultiExitModel, features_EN4: Tensor, index_N: Tensor) -> Tensor:
    if not model.gates:
        return torch.zeros(0, features_EN4.shape[1], 0)
    with torch.inference_mode():
        outputs = [
            torch.sigmoid(model.gate(layer)(features_EN4[row], index_N)) for row, layer in enumerate(model.exit_layers)
        ]
    return torch.stack(outputs, dim=-1).permute(1, 0, 2)


def padded(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        scored = torch.tensor(example.scored)
        labels[row, :length][scored] = ids[row, :length][scored]
    return ids, mask, labels


def threshold_for(tokens: Tokens, measure: str, depth: float) -> float:
    """The threshold whose mean depth is nearest to the one wanted; depth rises with the threshold."""
    values = MEASURES[measure](tokens.features_EN4[:-1])
    low, high = float(values.min()) - 1e-6, float(values.max())
    for _ in range(40):
        middle = (low + high) / 2
        if tokens.mean_depth(tokens.choice(measure, middle)) < depth:
            low = middle
        else:
            high = middle
    return high


def per_prompt(values_N: Tensor, prompt_N: Tensor) -> tuple[list[float], list[float]]:
    """Sums and counts of the prompts that occur."""
    present, inverse = prompt_N.unique(return_inverse=True)
    sums = torch.zeros(len(present), dtype=torch.float64).scatter_add_(0, inverse, values_N.double())
    counts = torch.zeros(len(present), dtype=torch.float64).scatter_add_(0, inverse, torch.ones_like(values_N).double())
    return sums.tolist(), counts.tolist()


def compared(own_N: Tensor, other_N: Tensor, prompt_N: Tensor, bootstrap: Bootstrap) -> dict[str, Any]:
    own, other = (bootstrap(ratio(*per_prompt(values_N, prompt_N))) for values_N in (own_N, other_N))
    difference = own.minus(other)
    return {"nll": other.value, "gates_minus_it": difference.value, "interval": difference.interval}


def report(tune: Tokens, rest: Tokens, others: dict[str, tuple[Tokens, Tokens]], column: int) -> dict[str, Any]:
    """One cost weight."""
    bootstrap = Bootstrap(len(rest.prompt_N.unique()))
    places_N = chosen_exit(rest.gates_KNG[column] >= 0.5)
    wanted = tune.mean_depth(chosen_exit(tune.gates_KNG[column] >= 0.5))
    own_N = rest.nll_at(places_N)
    generator = torch.Generator().manual_seed(0)
    shuffled = [rest.nll_at(places_N[torch.randperm(len(places_N), generator=generator)]) for _ in range(SHUFFLES)]
    row: dict[str, Any] = {
        "mean_depth": rest.mean_depth(places_N),
        "shares": {
            int(depth): float((places_N == place).float().mean()) for place, depth in enumerate(rest.depths_E.tolist())
        },
        "nll": float(own_N.double().mean()),
        "shuffled": compared(own_N, torch.stack(shuffled).mean(0), rest.prompt_N, bootstrap),
        "shuffled_nll_range": [float(min(s.mean() for s in shuffled)), float(max(s.mean() for s in shuffled))],
    }
    for name, (theirs, held_out) in others.items():
        found = []
        for measure in MEASURES:
            threshold = threshold_for(theirs, measure, wanted)
            found.append((float(theirs.nll_at(theirs.choice(measure, threshold)).mean()), measure, threshold))
        _, measure, threshold = min(found)
        choice_N = held_out.choice(measure, threshold)
        row[name] = {
            "measure": measure,
            "threshold": threshold,
            "mean_depth": held_out.mean_depth(choice_N),
            **compared(own_N, held_out.nll_at(choice_N), rest.prompt_N, bootstrap),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--against", nargs="*", default=[], metavar="NAME=MODEL", help="thresholds of these as well")
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--response", required=True)
    parser.add_argument("--tune", type=int, default=180)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    encoder = TextEncoder(load_tokenizer(args.model, False), None)
    template = PromptResponse(args.prompt.replace("\\n", "\n"), args.response.replace("\\n", "\n"))
    samples = read_samples(args.data, template, encoder)
    named = {"thresholds": args.model, **dict(item.split("=", 1) for item in args.against)}
    parts = {}
    for name, folder in named.items():
        tokens = collect(MultiExitModel.from_pretrained(folder).eval(), encoder, samples, args.batch_size)
        parts[name] = tokens.part(tokens.prompt_N < args.tune), tokens.part(tokens.prompt_N >= args.tune)
    gates = MultiExitModel.from_pretrained(args.model).config.gates
    assert gates is not None, "the model has no gates"
    tune, rest = parts["thresholds"]
    rows = {f"{w:g}": report(tune, rest, parts, column) for column, w in enumerate(gates.cost_weights)}
    full = {name: float(np.mean(part.nll_EN[-1].double().numpy())) for name, (_, part) in parts.items()}
    result = {"tokens": len(rest.prompt_N), "prompts": len(samples) - args.tune, "full_depth_nll": full, "rows": rows}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / "gates.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for weight, row in rows.items():
        print(f"cost_weight {weight}: depth {row['mean_depth']:.2f}, NLL {row['nll']:.4f}, shares {row['shares']}")
        for name in ("shuffled", *named):
            other = row[name]
            low, high = other["interval"]
            depth = f" at depth {other['mean_depth']:.2f} ({other['measure']})" if "mean_depth" in other else ""
            print(f"  {name:<12} NLL {other['nll']:.4f}{depth}; gates {other['gates_minus_it']:+.4f} ", end="")
            print(f"[{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main()
