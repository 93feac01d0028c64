"""What a checkpoint of a run holds: trainable weights, and frozen ones only if nothing else holds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eetrain.errors import CheckpointError
from eetrain.training.optimization import BACKBONE_PREFIX


def without_frozen_backbone(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """``state`` without the backbone's entries that training does not change.

    Args:
        state: state dict of ``module``.
        module: holds the backbone at ``model.backbone``.
    """
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: value for name, value in state.items() if name in trained or not name.startswith(BACKBONE_PREFIX)}


def with_frozen_backbone(saved: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """``saved`` completed by the entries :func:`without_frozen_backbone` leaves out, taken from ``module``."""
    own = module.state_dict()
    kept = without_frozen_backbone(own, module)
    return {**{name: value for name, value in own.items() if name not in kept}, **saved}


def check_state(saved: dict[str, Tensor], module: nn.Module) -> None:
    """Check that ``saved`` fits ``module`` exactly, name by name and shape by shape.

    Raises:
        CheckpointError: names the first weight that is missing, left over or of another shape.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    other = [name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    found = [
        f"{len(names)} weights {what} (first {min(names)})"
        for names, what in ((missing, "missing in it"), (extra, "unknown to this run"), (other, "of another shape"))
        if names
    ]
    if found:
        raise CheckpointError(
            f"The checkpoint does not fit the model of this run: {', '.join(found)}.",
            hint="Resume with the settings of model.backbone, exits, tuning and lora it was written with.",
        )


def check_settings(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Check that a checkpoint's frozen backbone is the one this run has loaded.

    Raises:
        CheckpointError: it names another folder or hub id.
    """
    if saved.get("frozen_backbone") != own.get("frozen_backbone"):
        raise CheckpointError(
            f"The checkpoint's frozen backbone is {saved.get('frozen_backbone')!r}, this run has "
            f"{own.get('frozen_backbone')!r}.",
            hint="Set model.backbone.path to the checkpoint's backbone, or train anew.",
        )
