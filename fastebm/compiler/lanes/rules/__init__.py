"""How each operation is lowered, by subject. The imports fill the table."""

from . import complex_numbers, convolutions, indexing, pointwise, pooling, products, reductions, sampling, views
from .table import COMPLEX_RULES, RULES

__all__ = [
    "COMPLEX_RULES",
    "RULES",
    "complex_numbers",
    "convolutions",
    "indexing",
    "pointwise",
    "pooling",
    "products",
    "reductions",
    "sampling",
    "views",
]
