"""Evidence: metrics per video, paired statistics over prompts, and a report that opens from disk."""

from __future__ import annotations

from vggrpo.evaluation.arms import arm_features, compare_quality, compare_recorded_quality, reference_features
from vggrpo.evaluation.compare import Comparison, MetricComparison, compare, compare_files
from vggrpo.evaluation.evaluate import evaluate_clip, evaluate_manifest
from vggrpo.evaluation.metrics import HEADLINE, METRICS, Clip, Measurement, Metric
from vggrpo.evaluation.metrics.quality import KernelComparison, compare_kernel_distance, kernel_distance
from vggrpo.evaluation.models import EvaluationModels
from vggrpo.evaluation.report import build_report
from vggrpo.evaluation.statistics import spearman, within_group_spearman
from vggrpo.evaluation.summary import Verdict, summarise, summarise_comparison, verdict

__all__ = [
    "HEADLINE",
    "METRICS",
    "Clip",
    "Comparison",
    "EvaluationModels",
    "KernelComparison",
    "Measurement",
    "Metric",
    "MetricComparison",
    "Verdict",
    "arm_features",
    "build_report",
    "compare",
    "compare_files",
    "compare_kernel_distance",
    "compare_quality",
    "compare_recorded_quality",
    "evaluate_clip",
    "evaluate_manifest",
    "kernel_distance",
    "reference_features",
    "spearman",
    "summarise",
    "summarise_comparison",
    "verdict",
    "within_group_spearman",
]
