"""Benchmark suites, their harness, and studies."""
