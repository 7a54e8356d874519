"""What samples are worth: judged by a classifier, and by their distance from the training images."""

from fastebm.evaluation.digits import DigitsVerdict, judge_digits
from fastebm.evaluation.neighbours import nearest_distances

__all__ = ["DigitsVerdict", "judge_digits", "nearest_distances"]
