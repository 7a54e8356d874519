"""Lane programs: the gradient of any energy of one sample, lowered to loops over many samples side by side."""

from .executor import LaneExecutor
from .lower import LaneError, lower
from .trace import JointGraph, multiplies, trace

__all__ = ["JointGraph", "LaneError", "LaneExecutor", "lower", "multiplies", "trace"]
