"""Hugging Face safetensors to roe_jax checkpoints and back, and straight onto devices.

The tensor names of every model family are one table in `rules`; all else
follows from it. Run as `python -m checkpoints_convert`.
"""

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

# Installed packages are found by their entry points; this is for a checkout that is not installed.
model_formats.register("hugging_face", HUGGING_FACE)
