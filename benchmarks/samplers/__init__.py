"""Samplers against their peers: the time of a step, and effective samples a second.

targets                    densities with known moments, for PyTorch and JAX alike
autocorrelation            the one estimate of effective samples that all are measured by
bench_samplers             the time of a step against eager loops and torchebm
bench_effective_samples    effective samples a second against blackjax and numpyro
jax_peers                  the process in which those run
page                       fills docs/results/samplers/README.md

`targets`, `autocorrelation` and `jax_peers` need numpy alone besides JAX: its environment has no PyTorch.
"""
