"""Helpers of tests: tiny models, shops, runs and cases, and scripts of other processes."""
