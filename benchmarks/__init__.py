"""Microbenchmarks against plain PyTorch and other projects: ``python -m benchmarks``."""
