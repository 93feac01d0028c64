r"""Does a policy that calls itself lossless give the full depth's tokens, on real prompts, in batches?

    python recipes/bench/losslessness.py CHECKPOINT --data DEV.csv --prompt '{mr}\n=> ' --response '{ref}' --limit 200 \
        --policy speculative:exit=3,draft=4 --batch_size 8 --dtype float64 --out FOLDER

Greedy decoding of every prompt under the policy and under `never` (or `--reference transformers`). Where texts part,
the common text before is run through the full depth once, alone and without a cache, and the two best logits are
looked at: one pass over several positions adds up in another order than one pass a position, and where two tokens are
as good as equal, rounding decides. So a difference counts where the full depth prefers one of the tokens by `--gap` or
more. After its first difference a text is another text; only the first is listed.

Writes losslessness.json. Exit status 1 if any difference counts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from checkpoint_and_prompts import add_arguments, machine, opened, write_json
from torch import Tensor

from eetrain import MultiExitModel
from eetrain.data.tokenization import TextEncoder
from eetrain.evaluation import Sample
from eetrain.evaluation.batches import generate_options, left_padded


@dataclass(frozen=True)
class Difference:
    """Where a text parts from the reference.

    Attributes:
        prompt: number of the prompt, from 0.
        position: in the new tokens, from 0.
        token: of the policy; ``None`` where its text had ended.
        reference: of the reference, likewise.
        top_gap: best logit of the full depth after the common text, less the second best.
        gap: the larger of that and of the distance between the logits of the two tokens.
    """

    prompt: int
    position: int
    token: int | None
    reference: int | None
    top_gap: float
    gap: float


def main() -> int:
    args = arguments()
    model, encoder, samples = opened(args, [int(layer) for layer in args.exits.split(",") if layer])
    own = decoded(model, encoder, samples, args, args.policy)
    other = decoded(model, encoder, samples, args, args.reference)
    found = differences(model, samples, own, other)
    counted = [difference for difference in found if difference.gap >= args.gap]
    for difference in found:
        print(difference)
    largest = max((difference.gap for difference in found), default=0.0)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    summary = (
        f"{args.policy} against {args.reference}, {len(samples)} prompts, batch {args.batch_size}, {dtype}, "
        f"{sum(map(len, other))} tokens: {len(found)} texts differ, {len(counted)} of them by {args.gap:g} or more, "
        f"largest gap {largest:.3g}"
    )
    print(summary)
    if args.out is not None:
        listed = {"settings": {k: v for k, v in vars(args).items() if k != "out"}, "machine": machine(model)}
        listed |= {"summary": summary, "counted": len(counted), "differences": [asdict(d) for d in found]}
        write_json(Path(args.out) / "losslessness.json", listed)
    return 1 if counted else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reference", default="never", help="a policy, or transformers")
    parser.add_argument("--exits", default="", help="such as 3,6, where the model lacks some")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--new_tokens", type=int, default=64, help="of each row, at most")
    parser.add_argument("--gap", type=float, default=1e-4, help="in logits; less is rounding")
    parser.add_argument("--out", default=None)
    return parser.parse_args()


def decoded(
    model: MultiExitModel, encoder: TextEncoder, samples: list[Sample], args: argparse.Namespace, policy: str
) -> list[list[int]]:
    """New tokens of each prompt, its end of text included."""
    options = generate_options(model, encoder, args.new_tokens)
    ends = options.get("eos_token_id", model.causal_lm.generation_config.eos_token_id)
    texts: list[list[int]] = []
    for start in range(0, len(samples), args.batch_size):
        print(f"{policy}: {start} of {len(samples)}", file=sys.stderr)
        prompts = [sample.prompt_ids for sample in samples[start : start + args.batch_size]]
        ids, mask = left_padded(prompts, encoder.pad_id, model.device)
        if policy == "transformers":
            rows = model.causal_lm.generate(ids, attention_mask=mask, **options)
        else:
            rows = model.generate(ids, attention_mask=mask, exit_policy=policy, **options)
        texts += [until_end(row[ids.shape[1] :], ends) for row in rows]
    return texts


def until_end(row: Tensor, ends: int | list[int] | None) -> list[int]:
    """Up to the first end of text, which belongs to it; what follows is padding."""
    tokens: list[int] = row.tolist()
    stops = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    places = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: places[0] + 1] if places else tokens


def differences(
    model: MultiExitModel, samples: list[Sample], own: list[list[int]], other: list[list[int]]
) -> list[Difference]:
    """The first of every text that has one."""
    found = []
    for number, (sample, mine, theirs) in enumerate(zip(samples, own, other, strict=True)):
        if mine == theirs:
            continue
        longest = max(len(mine), len(theirs))
        pairs = zip(*(text + [None] * (longest - len(text)) for text in (mine, theirs)), strict=True)
        position, (token, reference) = next((p, pair) for p, pair in enumerate(pairs) if pair[0] != pair[1])
        top, apart = gaps(model, [*sample.prompt_ids, *theirs[:position]], token, reference)
        found.append(Difference(number, position, token, reference, top, max(top, apart)))
    return found


@torch.inference_mode()
def gaps(model: MultiExitModel, text: list[int], token: int | None, reference: int | None) -> tuple[float, float]:
    """Between the two best logits after a text, and between those of two tokens, infinite if one of them is none."""
    logits = model.causal_lm(torch.tensor([text], device=model.device)).logits[0, -1].double()
    first, second = logits.topk(2).values.tolist()
    if token is None or reference is None:
        return first - second, float("inf")
    return first - second, abs(float(logits[token] - logits[reference]))


if __name__ == "__main__":
    sys.exit(main())
