"""The hub's layout of 4-bit codes.

A block of 16 bytes holds 32 codes along the tensor's last axis; the low half of a byte is the even
element of a pair.
"""

import numpy as np


def from_blocks(blocks: np.ndarray) -> np.ndarray:
  """Returns uint8 codes `[..., 32·G]`, one per byte, from blocks `[..., G, 16]`."""
  codes = np.empty((*blocks.shape, 2), np.uint8)
  codes[..., 0] = blocks & 15
  codes[..., 1] = blocks >> 4
  return codes.reshape(*blocks.shape[:-2], -1)


def to_blocks(codes: np.ndarray) -> np.ndarray:
  """Returns blocks from codes; the inverse of `from_blocks`."""
  return (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(*codes.shape[:-1], -1, 16)
