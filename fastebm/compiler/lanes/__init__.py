"""Lane programs: the gradient of any energy of one sample, lowered to loops over many samples side by side."""

from .trace import JointGraph, trace
from .lower import lower

__all__ = ["JointGraph", "lower", "trace"]
