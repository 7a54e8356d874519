"""Diagnostics of chains (`fastebm.diagnostics`): what they tell while they run, without keeping their trajectories."""

from fastebm.sampling.diagnostics.accumulators import Moments
from fastebm.sampling.diagnostics.observer import (
    BatchedDiagnostics,
    DiagnosticsObserver,
    LevelDiagnostics,
    run_observed,
)
from fastebm.sampling.diagnostics.readings import ChainReadings
from fastebm.sampling.diagnostics.streaming import Diagnostics
from fastebm.sampling.diagnostics.summary import ChainSummary
from fastebm.sampling.diagnostics.swaps import SwapCounter, SwapSummary

__all__ = [
    "BatchedDiagnostics",
    "ChainReadings",
    "ChainSummary",
    "Diagnostics",
    "DiagnosticsObserver",
    "LevelDiagnostics",
    "Moments",
    "SwapCounter",
    "SwapSummary",
    "run_observed",
]
