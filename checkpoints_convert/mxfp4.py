"""The hub's layout of codes of 4 bits.

A block is 16 bytes, 32 codes along the tensor's last axis; the lower half of a
byte is the even element of two neighbors.
"""

import numpy as np


def from_blocks(blocks: np.ndarray) -> np.ndarray:
  """uint8 codes `[..., 32·G]`, one in a byte, of blocks `[..., G, 16]`."""
  codes = np.empty((*blocks.shape, 2), np.uint8)
  codes[..., 0] = blocks & 15
  codes[..., 1] = blocks >> 4
  return codes.reshape(*blocks.shape[:-2], -1)


def to_blocks(codes: np.ndarray) -> np.ndarray:
  """The inverse of `from_blocks`."""
  return (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(*codes.shape[:-1], -1, 16)
