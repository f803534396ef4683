"""The parts of `experiments.report`: what it reads, compares, writes and draws."""
