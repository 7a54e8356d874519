"""Curves of a run's log as small drawings, one for each kind of quantity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastebm.plotting import svg_curves
from fastebm.report.pictures import Picture, PictureError, Pictures

PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Mean energies; low means real", {"energy_data": "real images", "energy_samples": "chain ends"}),
    ("Gap, chain ends minus real images", {"gap": "gap"}),
    ("Largest energies", {"largest_energy_data": "real images", "largest_energy_samples": "chain ends"}),
    ("Losses", {"loss": "loss of the energy", "vae_loss": "loss of the VAE", "flow_loss": "loss of the flow"}),
    ("Bits per dimension of training images", {"bits_per_dimension": "bits per dimension"}),
    ("Squared error of an image", {"squared_error": "reconstruction", "refined_error": "refined reconstruction"}),
    ("Nats", {"kl": "KL to the prior", "nll": "-log q of refined draws"}),
    ("ELBO, nats of an image", {"elbo": "ELBO"}),
    (
        "Squared distance of chains from their starts",
        {"calibration": "chains", "refinement": "chains", "noise_floor": "noise alone"},
    ),
    ("λ, the weight of the calibration", {"lambda": "λ"}),
    (
        "Gradient norms",
        {
            "gradient_norm": "energy",
            "gradient_norm_encoder": "encoder",
            "gradient_norm_decoder": "decoder",
            "gradient_norm_flow": "flow",
        },
    ),
    ("Learning rates", {"learning_rate": "learning rate", "energy_learning_rate": "of the energy"}),
    ("Pixels of chains", {"displacement": "mean way of a pixel", "clamped": "share at or beyond ±1"}),
)
"""Titles, and the labels of the quantities of the log that they show."""
NOT_DRAWN = {"iteration", "size", "attempt", "seconds", "note", "beta"}
MOST_OTHERS = 12
WIDTH, HEIGHT = 540, 290


def draw_curves(log: Sequence[Mapping[str, Any]], pictures: Pictures) -> Iterator[Picture | PictureError]:
    """A drawing for each kind of quantity that the log has, and for each further one; or why there is none."""
    present = dict.fromkeys(name for line in log for name in line if name not in NOT_DRAWN)
    known = {name for _, curves in PANELS for name in curves}
    others = [name for name in present if name not in known][:MOST_OTHERS]
    for title, curves in (*PANELS, *((name.replace("_", " "), {name: name}) for name in others)):
        if shown := {name: label for name, label in curves.items() if name in present}:
            ends = ", ".join(f"{label} {log[-1][name]:.4g}" for name, label in shown.items() if name in log[-1])
            alt = f"{title}, over the updates." + (f" At the end: {ends}." if ends else "")
            try:
                yield pictures.svg(svg_curves(log, shown), WIDTH, HEIGHT, alt, title)
            except PictureError as error:
                yield error
                return
