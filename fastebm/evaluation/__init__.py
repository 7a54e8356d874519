"""What samples are worth: distances from real images in features, a classifier's verdict, an energy's health."""

from fastebm.evaluation.calibration import CalibrationHealth, calibration_health
from fastebm.evaluation.comparison import Comparison, Distances, RealImages, compare
from fastebm.evaluation.digits import DigitsVerdict, judge_digits
from fastebm.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from fastebm.evaluation.features import FeatureClassifier, train_features
from fastebm.evaluation.health import EnergyHealth, acceptance_rate, energy_health, log_acceptance
from fastebm.evaluation.inception import Inception, InceptionVerdict, judge_by_inception
from fastebm.evaluation.neighbours import nearest_distances
from fastebm.evaluation.verdict import Verdict, judge

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
