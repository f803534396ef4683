"""Converts Hugging Face models to roe_jax checkpoints and back, and loads them directly.

`tensor_rules` has one table for each model family, from which everything else follows. Run it as
`python -m checkpoints_convert`.
"""

from checkpoints_convert import interrupts  # first: see there
from checkpoints_convert.common import ConversionError
from checkpoints_convert.from_hugging_face import convert_from_hugging_face
from checkpoints_convert.hub import is_hugging_face, load_config
from checkpoints_convert.loading import HUGGING_FACE, load
from checkpoints_convert.to_hugging_face import convert_to_hugging_face, save_hugging_face
from roe_jax import model_formats

__all__ = [
  "ConversionError",
  "convert_from_hugging_face",
  "convert_to_hugging_face",
  "is_hugging_face",
  "load",
  "load_config",
  "save_hugging_face",
]

# The entry point in setup.cfg does this too, but only for an installed package.
model_formats.register("hugging_face", HUGGING_FACE)
