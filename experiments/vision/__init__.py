"""Rosters of networks that are not language models.

`routed_network` says what a roster needs of a network, and runs one; `expected_gates` has the mean
gate that a roster tends to; `super_resolution` and `patch_transformer` are two networks.
"""
