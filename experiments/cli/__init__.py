"""Shared flags, checkpoints by name, multi-host runs and dry runs."""
