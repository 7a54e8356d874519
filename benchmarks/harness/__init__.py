"""The harness: workloads, baselines, comparison of revisions, plots and pages."""

import benchmarks.faults  # noqa: F401
