"""A shadow of a module tree: shares every parameter and submodule, but one path in it can be replaced.

The user's model is never touched: only the modules on the path to the replaced one are shallow-copied. The copies leave
forward hooks behind: those expect the module they were registered on, with nothing replaced in it.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def shadow(root: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Return a shallow copy of ``root`` in which each dotted path of ``replacements`` leads to its new module.

    Args:
        root: any module; it is not changed.
        replacements: dotted paths below ``root``, none of them a prefix of another.
    """
    copied = _shallow(root)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, module in replacements.items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = module
        else:
            copied._modules[name] = module
    for name, deeper in below.items():
        child = root._modules[name]
        assert child is not None
        copied._modules[name] = shadow(child, deeper)
    return copied


def _shallow(module: nn.Module) -> nn.Module:
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = dict(module._modules)
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        copied.__dict__[hooks] = OrderedDict()
    return copied
