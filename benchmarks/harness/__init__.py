"""The harness: workloads, baselines, comparison of revisions, plots and pages."""
