"""Settings that the presets of EC-VAE, the calibrated posterior and the calibrated flow share."""

from typing import Any

DIGITS_VAE: dict[str, Any] = {
    "size": 8,
    "channels": 1,
    "iterations": 1500,
    "batch_size": 64,
    "latent": 16,
    "width": 16,
    "max_width": 64,
    "learning_rate": 1e-3,
    "lr_decay": 0.3,
    "warmup": 200,
    "ema": 0.99,
}
"""A VAE of scikit-learn's digits."""

MNIST_VAE: dict[str, Any] = DIGITS_VAE | {
    "size": 32,
    "latent": 32,
    "max_width": 128,
    "warmup": 300,
    "ema": 0.995,
    "log_every": 20,
    "pictures_every": 1000,
}
"""A VAE of MNIST at 32x32 that is small enough for a CPU; the number of iterations is each method's own."""

PICTURES_VAE: dict[str, Any] = {
    "iterations": 1200,
    "batch_size": 32,
    "latent": 64,
    "width": 16,
    "max_width": 128,
    "learning_rate": 1e-3,
    "lr_decay": 0.3,
    "flip": True,
    "warmup": 150,
    "ema": 0.995,
    "log_every": 20,
    "pictures_every": 400,
}
"""A VAE of colour images at 32x32 that is small enough for a CPU."""

LONG_RUN: dict[str, Any] = {
    "flip": True,
    "ema": 0.9999,
    "log_every": 50,
    "checkpoint_every": 1000,
    "pictures_every": 5000,
}
"""Runs of 100,000 iterations and more on colour images."""
