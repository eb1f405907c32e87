"""Triton kernels, one file per op; installed as ``gflowgr.kernels``."""
