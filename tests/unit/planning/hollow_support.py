"""Models without weights, and the bytes of tensors, for tests of what stages hold."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from eetrain.backbones import Harvest
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.testing.tiny import tiny_config

LENGTH = 16
# The kernel for tests runs experts in a loop over their tokens, which the meta device cannot.
GROUPED = {"mixtral": {"experts_implementation": "grouped_mm"}, "qwen3_moe": {"experts_implementation": "grouped_mm"}}


def hollow(family: str, head: str = "norm", dtype: torch.dtype = torch.float32, **changes: object) -> MultiExitModel:
    config = tiny_config(family, **{**GROUPED.get(family, {}), **changes})
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return MultiExitModel(backbone, ExitConfig([1, 3], head=head))


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def handed_to(model: MultiExitModel, harvest: Harvest) -> set[int]:
    given = [leaf for call in harvest.calls for leaf in tree_leaves((call.args, call.kwargs))]
    tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
    return {*storages(tensors), *storages(model.parameters()), *storages(model.buffers())}
