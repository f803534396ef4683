"""Shared flags, checkpoints by name, multi-host runs, dry runs and temperature profiles."""
