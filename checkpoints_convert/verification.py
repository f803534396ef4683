"""Compares a converted checkpoint with the model that transformers makes of its source."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import pathlib
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from checkpoints_convert import carve_checkpoint, gguf_model, hub
from checkpoints_convert.common import ConversionError
from roe_jax import checkpoint, transformer
from roe_jax.checkpoint_folder import resolved
from roe_jax.families import from_hugging_face
from roe_jax.routing import with_experts
from roe_jax.text import utf8
from roe_jax.text.tokenizer import Tokenizer

# Largest relative difference of logits where the weights are the source's.
TOLERANCE = 1e-4
# Largest mean KL divergence, in nats, where the weights were rounded or quantized.
MAX_MEAN_KL = 0.1
_WINDOW = 256  # tokens per sequence
# Settings that change no logits.
_IDLE = "bos_token_id pad_token_id eos_token_ids context_length initializer_range tiny_init".split()


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Logits of the checkpoint against those of transformers, both computed in float32.

  Attributes:
    num_tokens: number of positions.
    difference: largest absolute difference over the largest absolute logit.
    mean_kl, max_kl: KL divergence of the checkpoint's next-token distributions from those of
      transformers, in nats.
    is_exact: whether the weights are the source's, neither rounded nor quantized.
    is_carved: whether all experts were active, since the checkpoint was carved out of the source.
  """

  num_tokens: int
  difference: float
  mean_kl: float
  max_kl: float
  is_exact: bool
  is_carved: bool

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
    active = ", with all experts active" if self.is_carved else ""
    return (
      f"against transformers on {self.num_tokens} tokens{active}: largest relative difference of "
      f"logits {self.difference:.2g}, KL divergence {self.mean_kl:.2g} mean, {self.max_kl:.2g} "
      f"largest (tolerance: {limit})"
    )


def check(num_tokens: int, text: str | None) -> None:
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


def check_source(folder: pathlib.Path, num_tokens: int, text: str | None) -> None:
  """Checks that transformers knows the architecture of a folder that `hub.find` returns.

  Raises:
    ConversionError: it does not, it reads the metadata of a GGUF file otherwise, or the text is
      too short.
    FileNotFoundError: there is a text and no tokenizer.
  """
  if text is not None:
    _encode(folder, num_tokens, text)
  import transformers

  path, options = _location(folder)
  with _one_sentence(path, options):
    config = transformers.AutoConfig.from_pretrained(path, **options)
    transformers.AutoModelForCausalLM._model_mapping[type(config)]
    if options:
      _check_metadata(hub.read_config(folder), config.to_dict())


def _location(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, str]]:
  """Returns the arguments with which transformers opens a folder that `hub.find` returns."""
  gguf = resolved(folder / gguf_model.WEIGHTS)
  return (gguf.parent, {"gguf_file": gguf.name}) if gguf.is_file() else (folder, {})


@contextlib.contextmanager
def _one_sentence(path, options):
  """Turns what transformers raises into one sentence."""
  try:
    yield
  except Exception as error:  # configs and models raise many types
    reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
    raise ConversionError(
      f"transformers cannot open {path / options.get('gguf_file', '')}, so there is nothing to "
      f"--verify with: {reason}"
    ) from error


def _check_metadata(own: dict[str, Any], read: dict[str, Any]) -> None:
  """Checks that transformers reads the same settings of a GGUF file; it leaves out some."""
  ours, theirs = (dataclasses.asdict(from_hugging_face(c, "float32")) for c in (own, read))
  for name, value in ours.items():
    found = theirs[name]
    same = value == found
    if isinstance(value, float) and isinstance(found, float):
      same = math.isclose(value, found, rel_tol=1e-6)
    if not same and name not in _IDLE:
      raise ValueError(f"it reads {name} as {found} instead of {value}")


def verify(
  folder: pathlib.Path, target: str | pathlib.Path, num_tokens: int, text: str | None = None
) -> Comparison:
  """Compares a checkpoint with transformers, in float32.

  Args:
    folder: the folder that was converted, as `hub.find` returns it.
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
  is_carved = carve_checkpoint.is_carved(config)
  if is_carved:  # with all experts active it is the source
    config = with_experts(config, config.num_experts)
  is_exact = (
    stored.expert_format in (None, "mxfp4")
    and stored.projection_format is None
    and stored.dtype in ("float32", hub.own_dtype(dtypes))
  )
  path, options = _location(folder)
  options |= dict(attn_implementation="eager", experts_implementation="eager")
  with _one_sentence(path, options):
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, **options
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
    num_tokens,
    float(difference / largest),
    float(np.mean(kl)),
    float(np.max(kl)),
    is_exact,
    is_carved,
  )


def _encode(folder, num_tokens, text):
  """Returns the first tokens of the text file."""
  tokens = Tokenizer.load(folder).encode(utf8.read(text))
  if len(tokens) < num_tokens:
    raise ConversionError(f"{text} has {len(tokens)} tokens, but --verify wants {num_tokens}")
  return np.asarray(tokens[:num_tokens])


def _log_softmax(logits):
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
