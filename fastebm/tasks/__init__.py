"""Tasks with a trained energy: denoise, inpaint, restore, translate, interpolate, detect outliers, generate."""

from fastebm.tasks import restoration
from fastebm.tasks.classical_denoisers import ClassicalDenoiser, tune_denoisers
from fastebm.tasks.denoise import DenoiseOptions, DenoisingResult, add_noise, denoise, tune_denoising
from fastebm.tasks.detection.level_statistics import LevelStatistics
from fastebm.tasks.detection.outlier_sets import constant_colours, flip, interpolations, rotate, uniform_noise
from fastebm.tasks.detection.run import DetectionResult, detect_outliers
from fastebm.tasks.detection.scores import (
    DetectionMetrics,
    detection_metrics,
    mean_energy,
    outlier_scores,
    total_variation,
)
from fastebm.tasks.generation.generate import GenerationResult, generate
from fastebm.tasks.generation.nearest_images import NearestImages, nearest_images
from fastebm.tasks.image_quality import Quality, psnr, quality, ssim
from fastebm.tasks.inpaint import InpaintingResult, InpaintOptions, inpaint
from fastebm.tasks.interpolate import ChainPath, ImagePath, PathOptions, interpolate_chains, interpolate_images
from fastebm.tasks.masks import hole_mask, load_hole_mask
from fastebm.tasks.restoration import restore
from fastebm.tasks.run_images import dataset_images, images_for
from fastebm.tasks.translate import TranslateOptions, TranslationResult, translate

__all__ = [
    "ChainPath",
    "ClassicalDenoiser",
    "DenoiseOptions",
    "DenoisingResult",
    "DetectionMetrics",
    "DetectionResult",
    "GenerationResult",
    "ImagePath",
    "InpaintOptions",
    "InpaintingResult",
    "LevelStatistics",
    "NearestImages",
    "PathOptions",
    "Quality",
    "TranslateOptions",
    "TranslationResult",
    "add_noise",
    "constant_colours",
    "dataset_images",
    "denoise",
    "detect_outliers",
    "detection_metrics",
    "flip",
    "generate",
    "hole_mask",
    "images_for",
    "inpaint",
    "interpolate_chains",
    "interpolate_images",
    "interpolations",
    "load_hole_mask",
    "mean_energy",
    "nearest_images",
    "outlier_scores",
    "psnr",
    "quality",
    "restoration",
    "restore",
    "rotate",
    "ssim",
    "total_variation",
    "translate",
    "tune_denoisers",
    "tune_denoising",
    "uniform_noise",
]
