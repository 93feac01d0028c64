"""Tiny models with exits, left-padded prompts and a driver of the runner, shared by the tests over all families.

Tokens are forced, not picked: the ids of a run are then known beforehand, and so is the truth about each position.
Shape suffixes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import DynamicCache

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import Harvester
from eetrain.decoding.confidence import MEASURES, Evidence
from eetrain.decoding.exit_runner import ExitRunner
from eetrain.testing.tiny import FAMILIES, tiny_model

ALL = tuple(FAMILIES)
LENGTHS = (11, 6, 9)  # the window of the sliding families is 8
STEPS = 7


def dtype_of(family: str) -> torch.dtype:
    """float64, but transformers' eager attention of gemma2 gives NaN on padded rows there."""
    return torch.float32 if family == "gemma2" else torch.float64


def close(family: str) -> dict[str, float]:
    """Tolerance: rounding only."""
    return {"rtol": 0, "atol": 1e-10} if dtype_of(family) == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}


@cache
def backbone(family: str):
    return tiny_model(family, dtype=dtype_of(family), eos_token_id=None)


def perturb(module: nn.Module, seed: int = 5, scale: float = 0.2) -> None:
    """Move parameters away from their start, where heads of their own equal the backbone's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))


@cache
def multi_exit(family: str, head: str = "norm", layers: tuple[int, ...] = (1, 2, 3)) -> MultiExitModel:
    model = MultiExitModel(backbone(family), ExitConfig(layers=list(layers), head=head)).eval()
    perturb(model.exits)
    return model


def positions_of(mask_BT: torch.Tensor) -> torch.Tensor:
    return (mask_BT.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Sequences:
    """Prompts, left-padded, and the tokens that will be fed after them."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    positions_BT: torch.Tensor
    prompt: int

    @property
    def steps(self) -> int:
        return self.ids_BT.shape[1] - self.prompt

    def row(self, row: int) -> Sequences:
        """One row without its padding."""
        real = self.mask_BT[row].bool()
        pads = int((~real).sum())
        parts = (tensor[row : row + 1, pads:] for tensor in (self.ids_BT, self.mask_BT, self.positions_BT))
        return Sequences(*parts, self.prompt - pads)

    def until(self, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.ids_BT[:, :stop], self.mask_BT[:, :stop], self.positions_BT[:, :stop]


def sequences(lengths: tuple[int, ...] = LENGTHS, steps: int = STEPS, seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    prompt = max(lengths)
    ids = torch.randint(3, 61, (len(lengths), prompt + steps), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : prompt - length], mask[row, : prompt - length] = 0, 0
    return Sequences(ids, mask, positions_of(mask), prompt)


@dataclass(frozen=True)
class Run:
    """What a run emitted: entry 0 comes from the prompt, entry k from the k-th forced token."""

    logits_BSV: torch.Tensor
    depth_BS: torch.Tensor
    runner: ExitRunner


@torch.no_grad()
def drive(model, policy, data: Sequences, after_step=lambda runner: None) -> Run:
    ids, mask, positions = data.until(data.prompt)
    runner = ExitRunner(model, policy, ids, mask, positions)
    emitted = [runner.prefill()]
    after_step(runner)
    for slot in range(data.prompt, data.ids_BT.shape[1]):
        emitted.append(runner.step(data.ids_BT[:, slot]))
        after_step(runner)
    logits, depths = zip(*emitted, strict=True)
    return Run(torch.stack(logits, 1), torch.stack(depths, 1), runner)


@torch.no_grad()
def teacher_forced(model, data: Sequences) -> dict[int, torch.Tensor]:
    """Exit -> its logits ``[B, S, V]`` at the slots a run emits from; the last block's number for the full depth."""
    output = model(data.ids_BT, data.mask_BT, data.positions_BT)
    logits = {layer: model.logits(output, layer) for layer in model.exit_layers}
    logits[model.num_blocks] = model.logits(output)
    return {layer: values[:, data.prompt - 1 :] for layer, values in logits.items()}


@torch.no_grad()
def confidences(model, data: Sequences, measure: str = "max") -> dict[int, torch.Tensor]:
    """Exit -> confidence ``[B, S]``, from one forward that keeps every block's output."""
    dense = MultiExitModel(model.backbone, ExitConfig(layers=list(range(1, model.num_blocks + 1)), head="tied"))
    hidden = dense(data.ids_BT, data.mask_BT, data.positions_BT).hidden
    harvester = Harvester(model.backbone, model.anatomy)
    first = harvester(data.ids_BT, attention_mask=data.mask_BT, position_ids=data.positions_BT).hidden_BTD
    logits = teacher_forced(model, data)
    found = {}
    for layer in model.exit_layers:
        before = (hidden[layer - 1] if layer > 1 else first)[:, data.prompt - 1 :]
        after = hidden[layer][:, data.prompt - 1 :]
        columns = [
            MEASURES[measure](Evidence(layer, after[:, s], before[:, s], lambda s=s, layer=layer: logits[layer][:, s]))
            for s in range(after.shape[1])
        ]
        found[layer] = torch.stack(columns, 1)
    return found


def between(values: torch.Tensor, quantile: float) -> float:
    """A number near a quantile that no value equals: rounding cannot flip a decision."""
    ordered = values.flatten().double().sort().values
    place = min(int(quantile * len(ordered)), len(ordered) - 2)
    while ordered[place + 1] - ordered[place] < 1e-5:
        place += 1
    return float((ordered[place] + ordered[place + 1]) / 2)


def expected_depths(confidence: dict[int, torch.Tensor], threshold: float, full: int, cap: int) -> torch.Tensor:
    """Depths ``[B, S]`` by the rule: first exit above the threshold, unless more than ``cap`` tokens would wait."""
    layers = sorted(confidence)
    rows, slots = confidence[layers[0]].shape
    depth = torch.full((rows, slots), full)
    for row in range(rows):
        waiting = 0
        for slot in range(1, slots):
            above = [layer for layer in layers if confidence[layer][row, slot] > threshold]
            if above and waiting < cap:
                depth[row, slot], waiting = above[0], waiting + 1
            else:
                waiting = 0
    return depth


def mixing_threshold(confidence: dict[int, torch.Tensor], full: int, cap: int = 100, start: float = 0.6) -> float:
    """A threshold near the quantile ``start`` under which rows have unequal depths in some step."""
    values = torch.stack([confidence[layer] for layer in confidence])
    for quantile in (start, 0.5, 0.7, 0.4, 0.8, 0.3, 0.9):
        threshold = between(values, quantile)
        if mixed(expected_depths(confidence, threshold, full, cap)):
            return threshold
    raise AssertionError("no threshold mixes depths: choose other ids")


def mixed(depth_BS: torch.Tensor) -> bool:
    """Whether some step has rows of unequal depth."""
    return any(len(column.unique()) > 1 for column in depth_BS.T)


def emitted(logits: dict[int, torch.Tensor], depth_BS: torch.Tensor) -> torch.Tensor:
    """Pick each slot's logits at the depth it ran to."""
    picked = torch.zeros_like(next(iter(logits.values())))
    for layer, values in logits.items():
        picked = torch.where((depth_BS == layer)[..., None], values, picked)
    return picked


@torch.no_grad()
def full_cache(model, data: Sequences) -> DynamicCache:
    """Keys and values of one forward of transformers over all ids; without a config no layer of it slides."""
    cache = DynamicCache()
    kwargs = {"past_key_values": cache, "use_cache": True}
    if model.anatomy.takes_position_ids:
        kwargs["position_ids"] = data.positions_BT
    model.causal_lm(data.ids_BT, attention_mask=data.mask_BT, **kwargs)
    return cache
