"""What a benchmark times: policies, and transformers on the same weights.

All candidates have the signature of ``transformers.generate`` and share one clock, a streamer. The backbone is never
copied: baselines are shadows of it that share its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import floor
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig

from eetrain.backbones import blocks_of
from eetrain.backbones.shadow import shadow
from eetrain.decoding import EarlyExitOutput, Policy
from eetrain.evaluation.bench.prompts import Workload
from eetrain.evaluation.timing import Clock, Timing

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


@dataclass(frozen=True)
class Candidate:
    """One way to decode.

    Attributes:
        name: ``dynamic``, ``static``, ``cut:6``, ``assistant:3`` or a policy's string.
        kind: ``dynamic``, ``static``, ``cut``, ``assistant`` or ``policy``.
        generate: with the signature of ``transformers.generate``.
        depth: blocks of each token where that is known ahead, else ``None``.
        drafts_at: exits that make drafts for the full depth to verify.
    """

    name: str
    kind: str
    generate: Callable[..., Any]
    depth: int | None = None
    drafts_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """One candidate, once through a workload.

    Attributes:
        tokens: new ids of every batch, ``[B, N]``.
        timing: sum over the batches.
        seconds: from the first call to the last return.
        depths: of the tokens after each row's first, from policies only.
        block_calls: blocks times positions computed after the prompts, repair included, from policies only.
        speculation: what became of the drafts, summed over the batches, from speculative policies only.
    """

    tokens: list[Tensor]
    timing: Timing
    seconds: float
    depths: list[int]
    block_calls: int | None
    speculation: Any = None

    @property
    def rounded_depth(self) -> int:
        """Mean depth as a whole number of blocks, halves rounded up."""
        return floor(sum(self.depths) / len(self.depths) + 0.5)


def policy_candidate(model: MultiExitModel, policy: Policy, drafts_at: tuple[int, ...] = ()) -> Candidate:
    """Our loop under a policy."""
    generate = partial(model.generate, exit_policy=policy, return_dict_in_generate=True)
    return Candidate(str(policy), "policy", generate, drafts_at=drafts_at)


def dynamic_baseline(model: MultiExitModel) -> Candidate:
    """``transformers.generate`` with its default cache."""
    return Candidate("dynamic", "dynamic", model.causal_lm.generate, model.num_blocks)


def static_baseline(model: MultiExitModel) -> Candidate:
    """``transformers.generate`` with a static cache and its steps compiled, which happens in the first run.

    Compiled code is forgotten first: sizes of earlier settings would make torch compile for sizes of any kind.
    """
    torch.compiler.reset()
    # generate keeps compiled code and cache length on the model; here they fall to a copy that shares all parts.
    lm = copy.copy(model.causal_lm)
    config = CompileConfig(dynamic=False)
    config._compile_all_devices = True  # off a GPU transformers compiles only when told so
    generate = partial(lm.generate, cache_implementation="static", compile_config=config)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        if "_compiled_call" not in vars(lm):
            raise RuntimeError(f"transformers does not compile {type(lm).__name__}")
        return output

    return Candidate("static", "static", compiled, model.num_blocks)


def cut_baseline(model: MultiExitModel, depth: int) -> Candidate:
    """``transformers.generate`` on the first blocks, final norm and output matrix of the backbone."""
    return Candidate(f"cut:{depth}", "cut", cut_backbone(model, depth).generate, depth)


def cut_backbone(model: MultiExitModel, depth: int) -> Any:
    """The causal LM with its first ``depth`` blocks only; it shares its parameters with the whole one."""
    cut = shadow_with_config(model, list(blocks_of(model.backbone, model.anatomy))[:depth])
    text = cut.config.get_text_config(decoder=True)
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:depth]
    return cut


def shadow_with_config(model: MultiExitModel, blocks: Sequence[nn.Module] | None = None) -> Any:
    """The causal LM with a config of its own; parameters are shared.

    Args:
        model: whose backbone it is.
        blocks: its blocks, by default all.
    """
    lm, anatomy = model.causal_lm, model.anatomy
    path = ".".join(filter(None, (anatomy.decoder, anatomy.blocks)))
    chosen = blocks_of(model.backbone, anatomy) if blocks is None else blocks
    copied = shadow(lm, {path: nn.ModuleList(list(chosen))})
    config = copy.deepcopy(lm.config)
    parts = path.split(".")
    for number in range(len(parts)):
        module: Any = copied.get_submodule(".".join(parts[:number]))
        if hasattr(module, "config"):
            module.config = config if module.config is lm.config else config.get_text_config(decoder=True)
    return copied


def run_once(
    candidate: Candidate,
    workload: Workload,
    new_tokens: int,
    clock_of: Callable[[], Clock] = Clock,
    *,
    to_the_end: bool = True,
) -> Run:
    """Decode all batches greedily.

    Args:
        candidate: what decodes.
        workload: the prompts.
        new_tokens: of each row, at most.
        clock_of: makes the clock of each batch.
        to_the_end: ends of text are not chosen, so that each row gets exactly ``new_tokens``.
    """
    tokens, depths, timing, speculations = [], [], Timing(), []
    calls: int | None = None
    began = perf_counter()
    for ids, mask in workload.batches:
        clock = clock_of()
        output = candidate.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens if to_the_end else None,
            pad_token_id=0,
            streamer=clock,
        )
        timing += clock.timing
        sequences = output if isinstance(output, Tensor) else output.sequences
        tokens.append(sequences[:, ids.shape[1] :])
        if isinstance(output, EarlyExitOutput):
            assert output.exit_trace is not None
            assert output.block_calls is not None
            depths += output.exit_trace[:, 1:].flatten().tolist()
            calls = (calls or 0) + output.block_calls
            speculations.append(getattr(output, "speculation", None))
    return Run(tokens, timing, perf_counter() - began, depths, calls, _summed(speculations))


def _summed(counts: Sequence[Any]) -> Any:
    """Counts of several generations in one dataclass; ``None`` where nothing was counted."""
    if not counts or counts[0] is None:
        return None
    return replace(
        counts[0], **{part.name: sum(getattr(one, part.name) for one in counts) for part in fields(counts[0])}
    )
