"""What a trained energy is good for, beside samples: denoising, inpainting, translation, ways between images."""

from fastebm.tasks.classical import ClassicalDenoiser, tuned_denoisers
from fastebm.tasks.denoise import Denoised, DenoiseOptions, denoise, tuned_denoising, with_noise
from fastebm.tasks.holes import hole_from_file, hole_of
from fastebm.tasks.images import images_for, own_images
from fastebm.tasks.inpaint import Inpainted, InpaintOptions, inpaint
from fastebm.tasks.interpolate import ChainPath, ImagePath, PathOptions, interpolate_chains, interpolate_images
from fastebm.tasks.neighbours import Neighbours, nearest_images
from fastebm.tasks.quality import Quality, quality
from fastebm.tasks.translate import Translated, TranslateOptions, translate

__all__ = [
    "ChainPath",
    "ClassicalDenoiser",
    "DenoiseOptions",
    "Denoised",
    "ImagePath",
    "InpaintOptions",
    "Inpainted",
    "Neighbours",
    "PathOptions",
    "Quality",
    "TranslateOptions",
    "Translated",
    "denoise",
    "hole_from_file",
    "hole_of",
    "images_for",
    "inpaint",
    "interpolate_chains",
    "interpolate_images",
    "nearest_images",
    "own_images",
    "quality",
    "translate",
    "tuned_denoisers",
    "tuned_denoising",
    "with_noise",
]
