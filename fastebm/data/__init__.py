"""Images: readers of every common format, their resolution pyramid, and the order in which training sees them."""

from fastebm.data.augmentation import add_noise, flip
from fastebm.data.batches import batches
from fastebm.data.errors import DataError
from fastebm.data.formats.digits import digits
from fastebm.data.formats.forms import Form, form_of
from fastebm.data.formats.opening import open_images
from fastebm.data.images import Images, to_float, to_pixels
from fastebm.data.masks import random_holes, surroundings
from fastebm.data.pyramid import ImagePyramid, average_pool_to, pyramid

__all__ = [
    "DataError",
    "Form",
    "ImagePyramid",
    "Images",
    "add_noise",
    "average_pool_to",
    "batches",
    "digits",
    "flip",
    "form_of",
    "open_images",
    "pyramid",
    "random_holes",
    "surroundings",
    "to_float",
    "to_pixels",
]
