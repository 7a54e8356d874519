"""What samples are worth: distances from real images in features, a classifier's verdict, nearest neighbours."""

from fastebm.evaluation.digits import DigitsVerdict, judge_digits
from fastebm.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from fastebm.evaluation.features import FeatureClassifier, train_features
from fastebm.evaluation.health import EnergyHealth, acceptance_rate, energy_health, log_acceptance
from fastebm.evaluation.neighbours import nearest_distances

__all__ = [
    "DigitsVerdict",
    "EnergyHealth",
    "FeatureClassifier",
    "FeatureStatistics",
    "acceptance_rate",
    "energy_health",
    "frechet_distance",
    "judge_digits",
    "kernel_distance",
    "log_acceptance",
    "nearest_distances",
    "precision_recall",
    "train_features",
]
