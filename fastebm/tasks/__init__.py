"""What trained energies are used for."""

from fastebm.tasks import restore
from fastebm.tasks.detect import DetectionMetrics, detection_metrics, mean_energy, outlier_scores, total_variation
from fastebm.tasks.detect_run import Detection, detect_outliers
from fastebm.tasks.generate import Generated, generate
from fastebm.tasks.outlier_sets import constant_colours, interpolations, uniform_noise

__all__ = [
    "Detection",
    "DetectionMetrics",
    "Generated",
    "constant_colours",
    "detect_outliers",
    "detection_metrics",
    "generate",
    "interpolations",
    "mean_energy",
    "outlier_scores",
    "restore",
    "total_variation",
    "uniform_noise",
]
