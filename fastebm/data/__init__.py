"""Images, their resolution pyramid, and the order in which training sees them."""

from fastebm.data.batches import batches
from fastebm.data.digits import digits
from fastebm.data.pyramid import average_pool_to, pyramid

__all__ = ["average_pool_to", "batches", "digits", "pyramid"]
