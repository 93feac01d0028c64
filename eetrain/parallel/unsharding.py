"""From a module that an engine has taken over back to a plain one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eetrain.parallel.engine_state import is_flat, whole

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
_PREFIX = "ds_"
_ATTRIBUTES = (
    *("_external_params", "_original_parameters", "pre_bwd_fn", "post_bwd_fn"),
    *("applied_pre_backward_ref_cnt", "all_parameters"),
)


class Traces:
    """Remembers the hooks of a module, so that those which an engine adds can be taken away again.

    Args:
        module: before the engine starts.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # By identity: what metrics say of their equality changes with their state.
        self._hooks = {id(part): [set(getattr(part, name)) for name in _HOOKS] for part in module.modules()}

    def remove(self, engine: Any) -> None:
        """Put whole parameters of their own in the place of those the engine uses, and end it; all take part."""
        # One at a time to the CPU: a GPU need not hold them all at once.
        plain = {id(p): _plain(p) for p in self._module.parameters() if is_flat(p)}
        engine.destroy()
        self.unhook(self._module)
        for part in self._module.modules():
            _restore(part, plain)

    def unhook(self, module: nn.Module) -> None:
        """Take the added hooks off a part of the module and all parts of it."""
        for part in module.modules():
            for name, kept in zip(_HOOKS, self._hooks.get(id(part), ()), strict=False):
                hooks = getattr(part, name)
                for key in set(hooks) - kept:
                    del hooks[key]


def _plain(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(whole(parameter).to("cpu", copy=True), requires_grad=parameter.requires_grad)


def _restore(part: nn.Module, plain: dict[int, nn.Parameter]) -> None:
    parameters = {name: None if p is None else plain.get(id(p), p) for name, p in dict.items(part._parameters)}
    for name in list(vars(part)):
        if name.startswith(_PREFIX) or name in _ATTRIBUTES:
            delattr(part, name)
    part._parameters = parameters
