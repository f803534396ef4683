"""The same model in llama.cpp, as cases of the benchmark: decode steps without a roster.

Needs llama-cpp-python and gguf; imported only where they are installed.
"""

import itertools
import pathlib
import tempfile
from typing import Any

import numpy as np

from checkpoints_convert import gguf_files, gguf_model
from experiments.benchmarks import random_gguf, random_models, sweeps
from experiments.benchmarks.bench import Bench, Call
from experiments.benchmarks.sweeps import Case, Sizes
from experiments.cli.extras import gguf, llama_cpp
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig


def obstacle(config: ModelConfig, checkpoint: str | None, platform: str) -> str | None:
  """Returns why llama.cpp cannot run the model, or None."""
  if platform != "cpu":
    return f"the comparison is one of CPUs, not of a {platform}"
  if checkpoint:
    return None if gguf_model.is_gguf(checkpoint) else f"{checkpoint} is no .gguf file"
  if config.family != random_gguf.FAMILY:
    return f"of the presets, only those of the family {random_gguf.FAMILY} can be"
  if (config.expert_format or config.dtype) not in random_gguf.KINDS:
    return f"llama.cpp has no format like {config.expert_format}"
  return None


def needed_bytes(config: ModelConfig, sizes: Sizes) -> int:
  """Returns the memory on top of roe_jax's own: the file, and what is repacked of it."""
  del sizes
  return 2 * params_lib.num_bytes(config)


def cases(bench: Bench, sizes: Sizes, num_cores: int) -> list[Case]:
  """Returns the cases of roe_jax and of llama.cpp, without a roster.

  llama.cpp reads the checkpoint's file, or one with the same random weights in the formats that are
  nearest to theirs, and uses as many threads as roe_jax has cores.
  """
  if bench.checkpoint:
    return _cases(bench, pathlib.Path(bench.checkpoint).expanduser(), sizes.context, num_cores)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model.gguf"
    random_gguf.write(path, bench.config, bench.params)
    # The file is mapped into memory, which outlives its name.
    return _cases(bench, path, sizes.context, num_cores)


def _cases(bench, path, context, num_cores):
  box, roster = bench.clean_history(context), bench.roster(1, 0.0)
  unique = bench.config.experts_per_token
  shared: dict[str, Any] = dict(
    num_members=1,
    temperature=0.0,
    context=context,
    batch_size=1,
    baseline=("roe_jax", 1, 0.0, context, 1),
    unique_experts=unique,
    tokens=1,
  )
  floor: dict[str, Any] = sweeps.floor(bench, roster, unique, context)
  model = Model(path, num_cores, context + len(bench.samples(1)))
  samples = bench.samples(1)[:, 0].tolist()
  model.prefill(bench.text(1, context)[0].tolist())
  difference, same = _compare(bench, model, box, samples)
  options = {"formats": _formats(path), "difference": difference}
  options |= {"same_tokens": same, "num_tokens": len(samples)}
  # It reads its own formats.
  theirs = _matrix_bytes(path, unique / bench.config.num_experts)
  theirs += random_models.cache_bytes(bench.config, context)
  of_theirs: dict[str, Any] = floor | {"floor_bytes": theirs}
  return [
    Case("roe_jax", parts=((bench.step(roster, box), 1),), **shared, **floor),
    Case("llama.cpp", parts=((_call(model, samples), 1),), options=options, **shared, **of_theirs),
  ]


def _compare(bench, model, box, samples):
  """Compares log-probabilities after each sample: the largest difference, and equal argmaxes."""
  differences, same = [], 0
  for i, token in enumerate(samples):
    ours = bench.log_probs(bench.roster(1, 0.0), box, i)[0]
    logits = model.step(token).astype(np.float64)
    found = logits - logits.max()
    found -= np.log(np.exp(found).sum())
    differences.append(float(np.abs(found - ours).max()))
    same += int(found.argmax() == ours.argmax())
  return max(differences), same


def _call(model, samples):
  turns = itertools.cycle(samples)

  def run(count):
    for _ in range(count):
      int(model.step(next(turns)).argmax())

  return Call(run)


def _matrices(path):
  """Returns the tensors that a step reads, by name: all but small ones, and the embedding once."""
  tensors = gguf_files.read_header(path).tensors
  unused = {"token_embd.weight"} if "output.weight" in tensors else set()
  return {n: t for n, t in tensors.items() if n not in unused and len(t.shape) > 1}


def _matrix_bytes(path, share):
  """Returns the bytes that a step reads, if it reads this share of the experts."""
  total = 0.0
  for name, tensor in _matrices(path).items():
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    num_bytes = np.prod(tensor.shape) / block * size
    total += num_bytes * (share if "_exps" in name else 1)
  return total


def _formats(path):
  """Returns the types of the matrices in the file, of most elements first."""
  sizes: dict[str, int] = {}
  for tensor in _matrices(path).values():
    kind = tensor.kind.name
    sizes[kind] = sizes.get(kind, 0) + int(np.prod(tensor.shape))
  return ", ".join(sorted(sizes, key=lambda kind: -sizes[kind]))


class Model:
  """A model in llama.cpp, with one sequence."""

  def __init__(self, path: pathlib.Path, num_threads: int, capacity: int, exact: bool = False):
    """Opens a file.

    Args:
      path: the file.
      num_threads: threads of llama.cpp.
      capacity: positions of the cache.
      exact: whether the cache is in float32; float16, the default of llama.cpp, otherwise.
    """
    cache = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
    self._model = llama_cpp.Llama(
      str(path),
      n_ctx=capacity,
      n_threads=num_threads,
      n_threads_batch=num_threads,
      type_k=cache,
      type_v=cache,
      verbose=False,
    )
    self._context = 0

  def prefill(self, tokens: list[int]) -> np.ndarray:
    """Starts the sequence with these tokens; returns the logits after the last, `[V]` float32."""
    self._context = 0
    logits = self.step(*tokens)
    self._context = len(tokens)
    return logits

  def step(self, *tokens: int) -> np.ndarray:
    """Runs tokens after the prefilled ones; returns the logits after the last, `[V]` float32.

    They are valid until the next step, which starts after the prefilled tokens again.
    """
    self._model.n_tokens = self._context
    self._model.eval(tokens)
    logits = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
    return np.ctypeslib.as_array(logits, (self._model.n_vocab(),))
