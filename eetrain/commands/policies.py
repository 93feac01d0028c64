"""Policies as they are given to a verb, and those it takes when none are given."""

from __future__ import annotations

from eetrain.commands.opening import as_list
from eetrain.exits import MultiExitModel
from eetrain.exits.gates import cost_name


def split_policies(policies: str | list[str] | None) -> list[str]:
    """Policies of a list, or of one string whose commas also separate options.

    A part that reads ``name=value`` belongs to the policy before it; anything else begins a policy.

    Example:
        >>> split_policies("never,threshold:0.9,measure=margin,always:6")
        ['never', 'threshold:0.9,measure=margin', 'always:6']
    """
    found: list[str] = []
    for text in as_list(policies):
        for part in text.split(","):
            option = "=" in part and ":" not in part.partition("=")[0]
            if option and found:
                found[-1] += f",{part}"
            else:
                found.append(part.strip())
    return found


def default_policies(model: MultiExitModel) -> list[str]:
    """``never``, the policy stored with the model, each exit, its gates or else two thresholds."""
    stored = getattr(model.causal_lm.generation_config, "exit_policy", None)
    policies = ["never", *([stored] if stored else [])]
    inner = [layer for layer in model.exit_layers if layer < model.num_blocks]
    policies += [f"always:{layer}" for layer in inner]
    if model.config.gates is not None:
        policies += [f"gate:0.5,cost_weight={cost_name(weight)}" for weight in model.config.gates.cost_weights]
    elif inner:
        policies += ["threshold:0.7", "threshold:0.9"]
    return policies
