"""What a trained energy is good for, beside samples: restoration, outliers, translation, ways between images."""

from fastebm.tasks import restoration as restore
from fastebm.tasks.classical_denoisers import ClassicalDenoiser, tuned_denoisers
from fastebm.tasks.denoise import Denoised, DenoiseOptions, denoise, tuned_denoising, with_noise
from fastebm.tasks.detection.level_statistics import LevelStatistics
from fastebm.tasks.detection.outlier_sets import constant_colours, flipped, interpolations, rotated, uniform_noise
from fastebm.tasks.detection.run import Detection, detect_outliers
from fastebm.tasks.detection.scores import (
    DetectionMetrics,
    detection_metrics,
    mean_energy,
    outlier_scores,
    total_variation,
)
from fastebm.tasks.generation.generate import Generated, generate
from fastebm.tasks.generation.nearest_images import Neighbours, nearest_images
from fastebm.tasks.image_quality import Quality, quality
from fastebm.tasks.inpaint import Inpainted, InpaintOptions, inpaint
from fastebm.tasks.interpolate import ChainPath, ImagePath, PathOptions, interpolate_chains, interpolate_images
from fastebm.tasks.masks import hole_from_file, hole_of
from fastebm.tasks.run_images import images_for, own_images
from fastebm.tasks.translate import Translated, TranslateOptions, translate

__all__ = [
    "ChainPath",
    "ClassicalDenoiser",
    "DenoiseOptions",
    "Denoised",
    "Detection",
    "DetectionMetrics",
    "Generated",
    "ImagePath",
    "InpaintOptions",
    "Inpainted",
    "LevelStatistics",
    "Neighbours",
    "PathOptions",
    "Quality",
    "TranslateOptions",
    "Translated",
    "constant_colours",
    "denoise",
    "detect_outliers",
    "detection_metrics",
    "flipped",
    "generate",
    "hole_from_file",
    "hole_of",
    "images_for",
    "inpaint",
    "interpolate_chains",
    "interpolate_images",
    "interpolations",
    "mean_energy",
    "nearest_images",
    "outlier_scores",
    "own_images",
    "quality",
    "restore",
    "rotated",
    "total_variation",
    "translate",
    "tuned_denoisers",
    "tuned_denoising",
    "uniform_noise",
    "with_noise",
]
