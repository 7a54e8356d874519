"""Benchmark suites, their harness, and studies."""

import contextlib
import warnings

# What is slower because something of ours failed is no result. Revisions to compare with may not know the warning yet.
with contextlib.suppress(ImportError):
    from fastebm.compiler.faults import FaultWarning

    warnings.filterwarnings("error", category=FaultWarning)
