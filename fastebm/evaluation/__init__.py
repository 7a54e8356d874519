"""Metrics of samples and energies: distances in features, predicted classes, nearest images, energy gap, acceptance."""

from fastebm.evaluation.calibration_metrics import CalibrationMetrics, calibration_metrics
from fastebm.evaluation.energy_metrics import EnergyMetrics, acceptance_rate, energy_metrics, log_acceptance
from fastebm.evaluation.evaluate import EvaluationResult, PredictedClasses, evaluate_digits, evaluate_samples
from fastebm.evaluation.metrics.comparison import Comparison, Distances, RealImages, compare
from fastebm.evaluation.metrics.features import FeatureClassifier, Features, train_features
from fastebm.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from fastebm.evaluation.metrics.inception import Inception, InceptionMetrics, inception_metrics
from fastebm.evaluation.metrics.kernel import kernel_distance
from fastebm.evaluation.metrics.nearest_neighbors import NearestDistances, nearest_distances
from fastebm.evaluation.metrics.precision_recall import precision_recall

__all__ = [
    "CalibrationMetrics",
    "Comparison",
    "Distances",
    "EnergyMetrics",
    "EvaluationResult",
    "FeatureClassifier",
    "FeatureStatistics",
    "Features",
    "Inception",
    "InceptionMetrics",
    "NearestDistances",
    "PredictedClasses",
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
