"""Prompts, batching, the lm-eval adapter and the methods that programs compare."""
