"""What fewer layers cost in quality and give in speed: measured on prompts, reported as table, files and picture."""

from eetrain.evaluation.agreement import DepthScore, teacher_forced
from eetrain.evaluation.depth import DepthSummary, summarise_depths
from eetrain.evaluation.environment import environment
from eetrain.evaluation.frontier import FrontierPoint, draw_frontier
from eetrain.evaluation.quality import bleu, exact_match
from eetrain.evaluation.report import Report
from eetrain.evaluation.runner import EvaluationSettings, evaluate_policies
from eetrain.evaluation.samples import Sample, read_samples
from eetrain.evaluation.timing import Timing, timed_generate

__all__ = [
    "DepthScore",
    "DepthSummary",
    "EvaluationSettings",
    "FrontierPoint",
    "Report",
    "Sample",
    "Timing",
    "bleu",
    "draw_frontier",
    "environment",
    "evaluate_policies",
    "exact_match",
    "read_samples",
    "summarise_depths",
    "teacher_forced",
    "timed_generate",
]
