"""Triton kernels of the dense head: log-probabilities and joint losses over the vocabulary."""
