"""The gates' turn in a pipeline: every stage holds all gates and steps them alike.

Gates are a few numbers each, but their targets need every depth's loss of every token. So the statistics of all depths
are gathered over the stages of a replica, and from there on all stages compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from eetrain.exits.gates import Gate
from eetrain.objectives import JointGating, ObjectiveOutput
from eetrain.parallel.engine_state import NamedTensors, engine_tensors, restore_engine
from eetrain.parallel.runner import Scored


class GateTrainer:
    """Steps the gates with an AdamW of their own, so that whatever rests beside them really rests.

    Args:
        named: the gates' parameters by name.
        optimizer: AdamW over them.
        clip_norm: largest norm of their gradients, or ``None``.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], optimizer: AdamW, clip_norm: float | None) -> None:
        self.named, self.optimizer, self.clip_norm = named, optimizer, clip_norm

    def step(
        self,
        objective: JointGating,
        gates: Mapping[int, Gate],
        scored: Scored,
        over_replicas: Callable[[Tensor], Tensor],
        lr_factor: float,
        before_step: Callable[[ObjectiveOutput], None],
    ) -> None:
        """One optimizer step.

        Args:
            objective: bound to the model.
            gates: of every exit.
            scored: of this replica.
            over_replicas: adds up over replicas.
            lr_factor: of the learning rates at this step.
            before_step: called with the loss when all gradients are there and nothing has been done with them.
        """
        with torch.enable_grad():
            result = objective.gate_step(gates, scored.statistics, scored.labels_N, over_replicas)
            result.total.backward()  # type: ignore[no-untyped-call]
        for parameter in self.named.values():
            if parameter.grad is not None:
                parameter.grad = over_replicas(parameter.grad)
        before_step(result)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.named.values(), self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state by name, for the one process that stores it."""
        for name, tensor in engine_tensors(_Plain(self.optimizer), self.named, owner=lambda index: True):
            if name not in self.named:
                yield name, tensor

    def restore(self, folder: NamedTensors) -> None:
        """Put the optimizer's state back."""
        restore_engine(_Plain(self.optimizer), self.named, folder)


class _Plain:
    """An optimizer without an engine, in the form that reads and writes an engine's state."""

    data_parallel_group = None

    def __init__(self, optimizer: AdamW) -> None:
        self.optimizer = self.basic_optimizer = optimizer
