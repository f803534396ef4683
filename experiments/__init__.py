"""Experiments that train and evaluate small models with `roe_jax`."""
