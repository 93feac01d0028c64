"""Where a decoding step of ours goes: one more run, with hooks, beside the timed ones.

Regions do not nest: what runs inside another region (the final norm inside the harvest, say) counts as the outer one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eetrain.backbones import Harvester, Projection, blocks_of, final_norm
from eetrain.decoding import ExitPolicy, Policy
from eetrain.evaluation.bench.candidates import policy_candidate, run_once
from eetrain.evaluation.bench.prompts import Workload
from eetrain.evaluation.timing import Clock

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel

PARTS = ("blocks", "heads", "harvest")


@dataclass(frozen=True)
class StepProfile:
    """Milliseconds of one decoding step of a whole batch, all steps' mean; the parts add up to the total.

    Attributes:
        total: of the run with hooks, which are a little slower than none.
        blocks: in the backbone's blocks.
        heads: in final norm, exit heads, gates, output matrix, and the policy's look at them.
        harvest: in the rest of the model's forward: embedding, masks, rotary tables.
        rest: logits processors, choice of the token, bookkeeping of rows and cache.
    """

    total: float
    blocks: float
    heads: float
    harvest: float
    rest: float


class _Regions:
    """Seconds spent in each part while decoding, outermost region only."""

    def __init__(self, device: torch.device) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.decoding = False
        self._device = device
        self._open: list[str] = []
        self._start = 0.0

    def enter(self, part: str) -> None:
        if not self._open:
            self._start = self._now()
        self._open.append(part)

    def leave(self) -> None:
        part = self._open.pop()
        if not self._open and self.decoding:
            self.spent[part] += self._now() - self._start

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return run

    def clock(self) -> Clock:
        return _DecodingClock(self)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()


class _DecodingClock(Clock):
    """Tells the regions when the prompt is done and when the last token is there."""

    def __init__(self, regions: _Regions) -> None:
        super().__init__()
        self._regions = regions

    def put(self, value: Tensor) -> None:
        super().put(value)
        self._regions.decoding = len(self.times) > 2  # its making, the prompt, the first token

    def end(self) -> None:
        self._regions.decoding = False


@dataclass(frozen=True)
class _TimedProjection(Projection):
    """An output matrix, which is no module and so has no hooks."""

    regions: _Regions | None = None

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        assert self.regions is not None
        logits: Tensor = self.regions.timed("heads", super().__call__)(hidden_ND)
        return logits


def profile_policy(model: MultiExitModel, policy: Policy, workload: Workload, new_tokens: int) -> StepProfile:
    """Decode a workload once and take the time of the parts of a step.

    Args:
        model: in eval mode.
        policy: decides depths.
        workload: the prompts.
        new_tokens: a row.
    """
    regions = _Regions(model.device)
    with _hooked(model, regions):
        candidate = policy_candidate(_watched_model(model, regions), _watched_policy(policy, regions))
        run = run_once(candidate, workload, new_tokens, regions.clock)
    steps = (new_tokens - 1) * len(workload.batches)
    total = run.timing.decode
    parts = {**regions.spent, "rest": total - sum(regions.spent.values())}
    return StepProfile(1000 * total / steps, **{part: 1000 * seconds / steps for part, seconds in parts.items()})


def _watched_model(model: MultiExitModel, regions: _Regions) -> MultiExitModel:
    """A shallow copy that hands out timed output matrices."""
    watched = copy.copy(model)
    norm, projection = model.shared_tail()
    watched.__dict__["shared_tail"] = lambda: (norm, _TimedProjection(**vars(projection), regions=regions))
    return watched


def _watched_policy(policy: Policy, regions: _Regions) -> Policy:
    if not isinstance(policy, ExitPolicy):
        return policy
    watched = copy.copy(policy)
    object.__setattr__(watched, "leave", regions.timed("heads", policy.leave))  # policies are frozen
    return watched


@contextmanager
def _hooked(model: MultiExitModel, regions: _Regions) -> Iterator[None]:
    handles = []
    for part, modules in _modules(model).items():
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: regions.enter(part)))
            # Always: a block that only stores keys and values is left by an exception.
            handles.append(module.register_forward_hook(lambda *_: regions.leave(), always_call=True))
    # The loop runs a shadow of the decoder, which leaves the decoder's hooks behind.
    harvest = Harvester.__call__
    setattr(Harvester, "__call__", regions.timed("harvest", harvest))  # noqa: B010
    try:
        yield
    finally:
        setattr(Harvester, "__call__", harvest)  # noqa: B010
        for handle in handles:
            handle.remove()


def _modules(model: MultiExitModel) -> dict[str, list[nn.Module]]:
    return {
        "blocks": list(blocks_of(model.backbone, model.anatomy)),
        "heads": [final_norm(model.backbone, model.anatomy), *model.exits.values(), *model.gates.values()],
    }
