"""Weights and optimizer state of an engine by name, the same whatever the ZeRO stage and the number of replicas.

For a parameter ``name`` there are::

    name                        the weight, in the precision of the engine
    optimizer/master/name       the weight in float32, where the engine's precision is a narrower one
    optimizer/exp_avg/name      AdamW's moments, float32
    optimizer/exp_avg_sq/name
    optimizer/step/name         how often AdamW has stepped it; at 0 there may be no moments

DeepSpeed's optimizers flatten the parameters of a group and cut the result among the replicas; its public helpers put
one parameter together again. Where there is nothing to cut, AdamW itself holds the state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from eetrain.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
# Lists of parameters, and the flat pieces of float32 that AdamW steps for each of the lists.
_FLAT_GROUPS = (
    ("fp16_groups", "fp32_partitioned_groups_flat"),  # ZeRO-3, in any precision
    ("bit16_groups", "single_partition_of_fp32_groups"),  # ZeRO-1 and 2, in any precision
    ("bf16_groups", "fp32_groups_flat_partition"),  # a pipeline in bfloat16
)


class NamedTensors(Protocol):
    """What is needed of a checkpoint folder."""

    @property
    def names(self) -> Collection[str]:
        """Names of its tensors."""

    def tensor(self, name: str) -> Tensor:
        """One of them."""


def state_name(key: str, name: str) -> str:
    """Name of a part of the optimizer's state: ``optimizer/exp_avg/model.exits.1.norm.weight``."""
    return f"optimizer/{key}/{name}"


def prepare_state(engine: Any) -> None:
    """Give AdamW its state before the first step, with the values it would begin with.

    DeepSpeed connects parameters with the state when the first group has been stepped, and passes over groups that have
    none by then; so it is done here, for all.
    """
    for _, flat in flat_groups(engine):
        zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
        engine.basic_optimizer.state[flat] = {"step": torch.tensor(0.0), **zeros}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def engine_tensors(
    engine: Any,
    named: Mapping[str, Tensor],
    *,
    optimizer: bool = True,
    owner: Callable[[int], bool] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, on the CPU; all replicas together run this to its end.

    Args:
        engine: DeepSpeed's; ``None`` if there is none and the tensors are whole.
        named: parameters and buffers of this process's stage, the same on all its replicas. A tensor with several names
            is given under each, its optimizer state under the first.
        optimizer: also give the optimizer's state.
        owner: tells by the place in ``named`` whether this process gives a tensor; by default replicas take turns.
    """
    place, count = _replica(engine)
    owns = owner or (lambda index: index % count == place)
    states = _states(engine) if optimizer and engine is not None else {}
    for index, (name, tensor) in enumerate(named.items()):
        weight = whole(tensor)
        if owns(index):
            yield name, weight.cpu()
        state = states.pop(id(tensor), None)
        for key, value in () if state is None else _parts(tensor, state):
            if owns(index):
                yield state_name(key, name), value.cpu()


def restore_engine(engine: Any, named: Mapping[str, Tensor], folder: NamedTensors) -> None:
    """Put weights and optimizer state of trained parameters back, at any ZeRO stage and number of replicas.

    Args:
        engine: DeepSpeed's, before its first step.
        named: parameters of this process's stage, as for :func:`engine_tensors`. Those that are not trained are passed
            over: they must hold their weights already.
        folder: as :func:`engine_tensors` wrote it.

    Raises:
        CheckpointError: it holds no state of a parameter that is trained.
    """
    states = _states(engine)
    for name, parameter in named.items():
        state = states.pop(id(parameter), None)
        if state is not None:
            _restore(name, parameter, state, folder)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together from its shards if it has some."""
    if not hasattr(tensor, "ds_id"):
        return tensor.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def partitioned_gradients(engine: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters and this process's parts of their gradients, as ZeRO holds them between backward and its step."""
    optimizer = engine.optimizer
    groups = optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else optimizer.params_in_partition
    for group, pieces in optimizer.averaged_gradients.items():
        real = [piece for piece in pieces or () if not getattr(piece, "_zero_padding", False)]
        # Where the last process's part is filled up, the filling is a piece too many.
        yield from zip(groups[group], real, strict=False)


def is_flat(parameter: Tensor) -> bool:
    """Whether an engine keeps the parameter in a flat piece, or the flat float32 copy of it."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def flat_groups(engine: Any) -> list[tuple[list[Tensor], Tensor]]:
    """Lists of parameters with the flat piece of float32 that AdamW steps for each; nothing where it steps them."""
    for of_parameters, of_pieces in _FLAT_GROUPS:
        if hasattr(engine.optimizer, of_pieces):
            pairs = zip(getattr(engine.optimizer, of_parameters), getattr(engine.optimizer, of_pieces), strict=True)
            return list(pairs)
    return []


def _states(engine: Any) -> dict[int, dict[str, Any]]:
    """AdamW's state of each trained parameter, by identity; one dict for all parameters of a flat piece."""
    state, groups = engine.basic_optimizer.state, flat_groups(engine)
    if groups:
        return {id(parameter): state[flat] for parameters, flat in groups for parameter in parameters}
    return {id(p): state[p] for group in engine.basic_optimizer.param_groups for p in group["params"]}


def _replica(engine: Any) -> tuple[int, int]:
    """Which replica this process is of, and of how many."""
    if not dist.is_initialized():
        return 0, 1
    group = None if engine is None else engine.data_parallel_group
    return dist.get_rank(group), dist.get_world_size(group)


def _parts(parameter: Tensor, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    flat = is_flat(parameter)
    yield "step", state["step"].clone() if state else torch.tensor(0.0)
    for key in MOMENTS if state else ():
        yield key, safe_get_full_optimizer_state(parameter, key) if flat else state[key]
    if flat and parameter.dtype != torch.float32:
        yield "master", safe_get_full_fp32_param(parameter)


@torch.no_grad()
def _restore(name: str, parameter: Tensor, state: dict[str, Any], folder: NamedTensors) -> None:
    import deepspeed

    if state_name("step", name) not in folder.names:
        raise CheckpointError(
            f"The checkpoint holds no optimizer state of {name}, which this run trains.",
            hint="Resume with the settings of model.tuning and model.objective it was written with.",
        )
    master = state_name("master", name)
    weight = folder.tensor(master if master in folder.names else name)
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(weight)
    flat = is_flat(parameter)
    if flat:
        _set(parameter, None, weight)
    if state_name(MOMENTS[0], name) not in folder.names:
        _forget(parameter, state, weight)
        return
    state["step"] = folder.tensor(state_name("step", name))
    for key in MOMENTS:
        moment = folder.tensor(state_name(key, name))
        if flat:
            _set(parameter, key, moment)
        else:
            state[key] = moment.to(parameter.device)


def _forget(parameter: Tensor, state: dict[str, Any], weight: Tensor) -> None:
    """Put moments back to what they are before the first step; in a flat piece there may be others beside them."""
    if not is_flat(parameter):
        state.clear()
        return
    for key in MOMENTS:
        _set(parameter, key, torch.zeros_like(weight, dtype=torch.float32))


def _set(parameter: Any, key: str | None, value: Tensor) -> None:
    """Write this process's part of a moment, or of the float32 weight."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        value = value.float()
        safe_set_full_optimizer_state(parameter, value, key) if key else safe_set_full_fp32_param(parameter, value)
        return
    # The helper for whole tensors of ZeRO-3 forgets that the last process's part is filled up.
    group, size = parameter.ds_process_group, parameter.ds_tensor.numel()
    filled = F.pad(value.flatten().float(), (0, size * dist.get_world_size(group) - value.numel()))
    own = filled.narrow(0, size * dist.get_rank(group), size)
    safe_set_local_optimizer_state(parameter, own, key) if key else safe_set_local_fp32_param(parameter, own)
