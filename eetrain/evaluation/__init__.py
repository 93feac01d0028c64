"""What fewer layers cost in quality and give in speed: measured on prompts, reported as table, files and picture."""

from eetrain.evaluation.agreement import DepthScore, teacher_forced
from eetrain.evaluation.bootstrap import Bootstrap, Resampled, Sums
from eetrain.evaluation.comparison import Comparison, compare_reports
from eetrain.evaluation.depth import DepthSummary, summarise_depths
from eetrain.evaluation.environment import environment
from eetrain.evaluation.forced import ReferenceScore, forced_nll
from eetrain.evaluation.frontier import draw_frontier
from eetrain.evaluation.frontier_point import FrontierPoint
from eetrain.evaluation.metrics import METRICS, Metric
from eetrain.evaluation.quality import bleu, exact_match, rouge_l
from eetrain.evaluation.report import Report
from eetrain.evaluation.runner import evaluate_policies
from eetrain.evaluation.samples import Sample, read_samples
from eetrain.evaluation.settings import EvaluationSettings
from eetrain.evaluation.timing import Timing, timed_generate

__all__ = [
    "METRICS",
    "Bootstrap",
    "Comparison",
    "DepthScore",
    "DepthSummary",
    "EvaluationSettings",
    "FrontierPoint",
    "Metric",
    "ReferenceScore",
    "Report",
    "Resampled",
    "Sample",
    "Sums",
    "Timing",
    "bleu",
    "compare_reports",
    "draw_frontier",
    "environment",
    "evaluate_policies",
    "exact_match",
    "forced_nll",
    "read_samples",
    "rouge_l",
    "summarise_depths",
    "teacher_forced",
    "timed_generate",
]
