"""Batches and configs to train the embedded models."""
