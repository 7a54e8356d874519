"""What samples are worth: distances from real images in features, a classifier's verdict, an energy's health."""

from fastebm.evaluation.calibration_metrics import CalibrationMetrics, calibration_metrics
from fastebm.evaluation.energy_metrics import EnergyMetrics, acceptance_rate, energy_metrics, log_acceptance
from fastebm.evaluation.metrics.classifier import EvaluationResult, evaluate_samples
from fastebm.evaluation.metrics.comparison import Comparison, Distances, RealImages, compare
from fastebm.evaluation.metrics.digits import DigitsEvaluation, evaluate_digits
from fastebm.evaluation.metrics.distances import (
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from fastebm.evaluation.metrics.features import FeatureClassifier, train_features
from fastebm.evaluation.metrics.inception import Inception, InceptionMetrics, inception_metrics
from fastebm.evaluation.metrics.nearest_neighbors import nearest_distances

__all__ = [
    "CalibrationMetrics",
    "Comparison",
    "DigitsEvaluation",
    "Distances",
    "EnergyMetrics",
    "EvaluationResult",
    "FeatureClassifier",
    "FeatureStatistics",
    "Inception",
    "InceptionMetrics",
    "RealImages",
    "acceptance_rate",
    "calibration_metrics",
    "compare",
    "energy_metrics",
    "evaluate_digits",
    "evaluate_samples",
    "frechet_distance",
    "inception_metrics",
    "kernel_distance",
    "log_acceptance",
    "nearest_distances",
    "precision_recall",
    "train_features",
]
