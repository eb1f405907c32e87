"""Triton kernels of the prefix tree."""
