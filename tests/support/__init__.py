"""What tests share: tiny models, shops, runs and cases, and other processes' scripts."""
