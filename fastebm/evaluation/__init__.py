"""What samples are worth: distances from real images in features, a classifier's verdict, an energy's health."""

from fastebm.evaluation.calibration_metrics import CalibrationHealth, calibration_health
from fastebm.evaluation.energy_health import EnergyHealth, acceptance_rate, energy_health, log_acceptance
from fastebm.evaluation.metrics.classifier import Verdict, judge
from fastebm.evaluation.metrics.comparison import Comparison, Distances, RealImages, compare
from fastebm.evaluation.metrics.digits import DigitsVerdict, judge_digits
from fastebm.evaluation.metrics.distances import (
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from fastebm.evaluation.metrics.features import FeatureClassifier, train_features
from fastebm.evaluation.metrics.inception import Inception, InceptionVerdict, judge_by_inception
from fastebm.evaluation.metrics.nearest_neighbors import nearest_distances

__all__ = [
    "CalibrationHealth",
    "Comparison",
    "DigitsVerdict",
    "Distances",
    "EnergyHealth",
    "FeatureClassifier",
    "FeatureStatistics",
    "Inception",
    "InceptionVerdict",
    "RealImages",
    "Verdict",
    "acceptance_rate",
    "calibration_health",
    "compare",
    "energy_health",
    "frechet_distance",
    "judge",
    "judge_by_inception",
    "judge_digits",
    "kernel_distance",
    "log_acceptance",
    "nearest_distances",
    "precision_recall",
    "train_features",
]
