"""Cases and timing for `experiments.benchmark`."""
