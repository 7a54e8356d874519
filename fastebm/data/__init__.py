"""Image data: readers of common formats, resolution pyramids, and shuffling and augmentation for training."""

from fastebm.data.augmentation import add_noise, flip
from fastebm.data.batches import batches
from fastebm.data.errors import DataError
from fastebm.data.formats.digits import digits
from fastebm.data.formats.image_format import ImageFormat, image_format
from fastebm.data.formats.open_images import open_images
from fastebm.data.images import Images, to_float, to_pixels
from fastebm.data.masks import neighbour_mean, random_hole_masks
from fastebm.data.pyramid import ImagePyramid, average_pool_to, pyramid

__all__ = [
    "DataError",
    "ImageFormat",
    "ImagePyramid",
    "Images",
    "add_noise",
    "average_pool_to",
    "batches",
    "digits",
    "flip",
    "image_format",
    "neighbour_mean",
    "open_images",
    "pyramid",
    "random_hole_masks",
    "to_float",
    "to_pixels",
]
