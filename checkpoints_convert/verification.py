"""Compares a converted checkpoint with the model that transformers makes of its source."""

import dataclasses
import functools
import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from checkpoints_convert import gguf_model, hub
from checkpoints_convert.common import ConversionError
from roe_jax import checkpoint, transformer
from roe_jax.text.tokenizer import Tokenizer

# Largest relative difference of logits where the weights are the source's.
TOLERANCE = 1e-4
# Largest mean KL divergence, in nats, where the weights were rounded or quantized.
MAX_MEAN_KL = 0.1
_WINDOW = 256  # tokens per sequence


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Logits of the checkpoint against those of transformers, both computed in float32.

  Attributes:
    num_tokens: number of positions.
    difference: largest absolute difference over the largest absolute logit.
    mean_kl, max_kl: KL divergence of the checkpoint's next-token distributions from those of
      transformers, in nats.
    is_exact: whether the weights are the source's, neither rounded nor quantized.
  """

  num_tokens: int
  difference: float
  mean_kl: float
  max_kl: float
  is_exact: bool

  @property
  def passes(self) -> bool:
    """Whether the difference is within `TOLERANCE`, or else `MAX_MEAN_KL`; False if not finite."""
    if self.is_exact:
      return self.difference <= TOLERANCE
    return self.mean_kl <= MAX_MEAN_KL

  def __str__(self):
    limit = (
      f"largest relative difference at most {TOLERANCE:g}"
      if self.is_exact
      else f"mean KL at most {MAX_MEAN_KL:g}, since weights were rounded or quantized"
    )
    return (
      f"against transformers on {self.num_tokens} tokens: largest relative difference of logits "
      f"{self.difference:.2g}, KL divergence {self.mean_kl:.2g} mean, {self.max_kl:.2g} largest "
      f"(tolerance: {limit})"
    )


def check(source: str, num_tokens: int, text: str | None) -> None:
  """Checks what a comparison needs, before anything is converted.

  Raises:
    ConversionError: torch or transformers is missing, or the arguments are impossible.
  """
  if num_tokens < 1:
    raise ConversionError(f"--verify must be at least 1 token, got {num_tokens}")
  if text is not None and not pathlib.Path(text).is_file():
    raise ConversionError(f"there is no text file {text}: give one with --verify_text")
  if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
    raise ConversionError(
      '--verify compares with transformers, which is not installed: pip install "roe_jax[parity]"'
    )
  if gguf_model.is_gguf(source):
    raise ConversionError(
      "--verify compares with transformers, which does not read all GGUF files alike: leave it out"
    )


def check_source(folder: pathlib.Path, num_tokens: int, text: str | None) -> None:
  """Checks that transformers knows the architecture of a Hugging Face folder.

  Raises:
    ConversionError: it does not, or the text is too short.
    FileNotFoundError: there is a text and no tokenizer.
  """
  if text is not None:
    _encode(folder, num_tokens, text)
  import transformers

  try:
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM._model_mapping[type(config)]
  except Exception as error:  # configs raise many types
    reason = str(error).strip().split("\n")[0][:200]
    raise ConversionError(
      f"transformers cannot open {folder}, so there is nothing to --verify with: {reason}"
    ) from error


def verify(
  folder: pathlib.Path, target: str | pathlib.Path, num_tokens: int, text: str | None = None
) -> Comparison:
  """Compares a checkpoint with transformers, in float32.

  Args:
    folder: the Hugging Face folder that was converted.
    target: the checkpoint.
    num_tokens: number of tokens.
    text: a file of text; random tokens by default.

  Raises: as `check_source`.
  """
  import torch
  import transformers

  params, config = checkpoint.load(target, dtype="float32")
  if text is None:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, num_tokens)
  else:
    tokens = _encode(folder, num_tokens, text)
  stored = checkpoint.load_config(target)
  dtypes = checkpoint.load_provenance(target)["source_dtypes"]
  is_exact = stored.expert_format in (None, "mxfp4") and stored.dtype in (
    "float32",
    hub.own_dtype(dtypes),
  )
  model: Any = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
  ).eval()
  forward = jax.jit(functools.partial(transformer.forward, config=config))
  size = min(_WINDOW, config.context_length)
  largest, difference, kl = 0.0, 0.0, []
  for start in tqdm(range(0, num_tokens, size), desc="verifying", unit="window"):
    window = tokens[None, start : start + size]
    ours = np.asarray(forward(params, tokens_BxT=jax.numpy.asarray(window))[0][0], np.float64)
    with torch.no_grad():
      theirs = model(torch.tensor(window)).logits[0].double().numpy()
    difference = np.maximum(difference, np.abs(ours - theirs).max())  # keeps NaN
    largest = max(largest, np.abs(theirs).max())
    p, q = (_log_softmax(logits) for logits in (theirs, ours))
    kl.extend((np.exp(p) * (p - q)).sum(-1))
  return Comparison(
    num_tokens, float(difference / largest), float(np.mean(kl)), float(np.max(kl)), is_exact
  )


def _encode(folder, num_tokens, text):
  """Returns the first tokens of the text file."""
  tokens = Tokenizer.load(folder).encode(pathlib.Path(text).read_text("utf-8"))
  if len(tokens) < num_tokens:
    raise ConversionError(f"{text} has {len(tokens)} tokens, but --verify wants {num_tokens}")
  return np.asarray(tokens[:num_tokens])


def _log_softmax(logits):
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
