"""Whether objective, exits, tuning and what is loaded go together."""

from __future__ import annotations

from eetrain.errors import ConfigError
from eetrain.objectives import Objective
from eetrain.training.settings import ModelSettings


def check_consistency(objective: Objective, settings: ModelSettings, activation_checkpointing: bool) -> None:
    """Refuse settings of a module that contradict each other; nothing is built yet.

    Args:
        objective: what is minimised.
        settings: of the model.
        activation_checkpointing: whether blocks are run again in backward.

    Raises:
        ConfigError: names the settings.
    """
    name, tuning = type(objective).__name__, settings.tuning
    if objective.freezes_backbone and tuning != "frozen":
        raise ConfigError(
            f"The objective {name} trains exits of a frozen backbone, but model.tuning={tuning}.",
            hint="Set model.tuning=frozen, or use MultiExitCrossEntropy.",
        )
    if settings.exits.gates is not None and not objective.trains_gates:
        raise ConfigError(
            f"model.exits.gates is set, but the objective {name} trains no gates.",
            hint="Use JointGating, or leave model.exits.gates out.",
        )
    if objective.drops_blocks and tuning == "frozen":
        raise ConfigError(
            f"The objective {name} drops blocks, but with model.tuning=frozen none of them learns from it.",
            hint="Leave dropout out of the objective, or set model.tuning=full or lora.",
        )
    if settings.backbone.load == "exits" and objective.needs_full_depth():
        raise ConfigError(
            f"model.backbone.load=exits leaves out the last blocks, but the objective {name} needs them.",
            hint="Set model.backbone.load=full, or full_weight=0 in the objective.",
        )
    if activation_checkpointing and tuning == "frozen":
        raise ConfigError(
            "model.activation_checkpointing is on, but a frozen backbone keeps no activations.",
            hint="Set model.activation_checkpointing=false.",
        )
