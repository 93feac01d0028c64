"""Training objectives: features at the exits and labels become named loss terms and their sum."""

from eetrain.objectives.ee_tuning import EETuning
from eetrain.objectives.joint_gating import JointGating
from eetrain.objectives.layer_dropout import LayerDropout
from eetrain.objectives.layerskip import LayerSkip
from eetrain.objectives.multi_exit import MultiExitCrossEntropy
from eetrain.objectives.objective import FULL, HeadInputs, Objective, ObjectiveOutput, score
from eetrain.objectives.skipdecode import SkipDecode
from eetrain.objectives.teacher import Distillation

__all__ = [
    "FULL",
    "Distillation",
    "EETuning",
    "HeadInputs",
    "JointGating",
    "LayerDropout",
    "LayerSkip",
    "MultiExitCrossEntropy",
    "Objective",
    "ObjectiveOutput",
    "SkipDecode",
    "score",
]
