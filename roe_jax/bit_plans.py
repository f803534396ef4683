"""Plans of bits: how many bits of each expert are kept, by a rule (QuantMoE-Bench, 2406.08155).

A plan is an array `[L, E]` of bits for experts in a nested format. Rules rank experts; the best get
all bits and the others those of the base, so that the mean is met exactly. All experts are of one
size, so plans of one mean have as many bytes.
"""

from collections.abc import Callable, Sequence
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import diagnostics, makers, quantization, transformer, typed
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.layer_inputs import LayerOptions, TokenBatch
from roe_jax.nested import Nested
from roe_jax.params import Params
from roe_jax.quantization import CONTRACTED, Quantized
from roe_jax.roster import Roster


class Evidence(NamedTuple):
  """What rules may look at: a model with unquantized experts, and sequences of its tokens."""

  params: Params
  config: ModelConfig
  sequences: Sequence[Sequence[int]] = ()


class Rule(NamedTuple):
  """A rule.

  Attributes:
    mean: mean bits of the experts.
    scores: `scores(evidence)`, float `[L, E]`: the experts with the largest get more bits.
    needs_text: whether it looks at sequences.
  """

  mean: float
  scores: Callable[[Evidence], np.ndarray]
  needs_text: bool = False


@makers.parametric
def uniform(mean=3):
  return Rule(mean, lambda of: np.zeros((of.config.num_expert_layers, of.config.num_experts)))


@makers.parametric
def random(mean=3, seed=0):
  def scores(of):
    return np.random.default_rng(seed).random((of.config.num_expert_layers, of.config.num_experts))

  return Rule(mean, scores)


@makers.parametric
def first_blocks(mean=3):
  return Rule(mean, lambda of: _of_layers(of, -np.arange(of.config.num_expert_layers)))


@makers.parametric
def outlier(mean=3):
  """The largest ratio, over an expert's matrices and inputs, of a weight to the mean size."""

  def ratio(weights, axis):  # the outputs' axis
    sizes = np.abs(np.asarray(weights, np.float32))
    return sizes.max(axis) / np.maximum(sizes.mean(axis), np.finfo(np.float32).tiny)

  def scores(of):
    experts = of.params.layers.experts
    of_both = ratio(experts.gate_up, 2).max((2, 3)), ratio(experts.down, 3).max(2)
    return np.maximum(*of_both)

  return Rule(mean, scores)


@makers.parametric
def frequency(mean=3):
  """How often the model chooses an expert."""
  return Rule(mean, lambda of: _counts(of, Roster.create(of.config)), needs_text=True)


@makers.parametric
def roster_frequency(mean=3, tau=0.3, n=8, seed=0):
  """How often the members of a roster choose an expert."""
  scores = lambda of: _counts(of, Roster.create(of.config, n, tau, seed=seed))
  return Rule(mean, scores, needs_text=True)


@makers.parametric
def cosine(mean=3):
  """How much a layer's experts turn hidden states: 1 - cos of those before and after them."""
  return Rule(mean, lambda of: _of_layers(of, _turns(of)), needs_text=True)


RULES = {
  rule.__name__: rule
  for rule in (uniform, random, first_blocks, outlier, frequency, roster_frequency, cosine)
}


def find(name: str) -> Rule:
  """Returns a rule that is written as "frequency" or "frequency(mean=3)".

  Raises:
    ValueError: there is none.
  """
  found = RULES[name]() if name in RULES else makers.read(name, RULES)
  if found is None:
    raise ValueError(
      f"unknown plan of bits {name!r}: give a JSON file of such a plan, or one of the rules "
      f"{makers.usages(RULES)}"
    )
  return found


def allocate(scores: np.ndarray, mean: float, format: Nested) -> np.ndarray:
  """Returns a plan `[L, E]` with this mean, to one plane: int64.

  Equal scores, such as those of a uniform plan, may get different bits only where the mean is not
  a whole number.

  Raises:
    ValueError: the format has no such mean.
  """
  if not format.base <= mean <= format.bits:
    raise ValueError(
      f"a plan of bits for {format.name} has a mean of {format.base} to {format.bits}, got {mean:g}"
    )
  if mean == int(mean) and np.ptp(scores) == 0:
    return np.full(scores.shape, int(mean))
  more = format.bits - format.base
  whole, rest = divmod(round((mean - format.base) * scores.size), max(more, 1))
  bits = np.full(scores.size, format.base)
  order = np.argsort(-scores.reshape(-1), kind="stable")
  bits[order[:whole]] = format.bits
  bits[order[whole : whole + 1]] += rest
  return bits.reshape(scores.shape)


def check(plan: Any, config: ModelConfig, format: Nested) -> np.ndarray:
  """Returns a plan as an array.

  Raises:
    ValueError: it does not fit the model or the format.
  """
  shape = config.num_expert_layers, config.num_experts
  try:
    found = np.asarray(plan)
  except ValueError:  # lists of different lengths
    found = np.zeros(0)
  if found.shape != shape or found.dtype.kind != "i":
    raise ValueError(
      f"a plan of bits for this model is a list of {shape[0]} lists (layers) of {shape[1]} whole "
      f"numbers (experts), got one of shape {list(found.shape)}"
    )
  if found.min() < format.base or found.max() > format.bits:
    raise ValueError(
      f"a plan of bits for {format.name} has {format.base} to {format.bits} per expert, got "
      f"{found.min()} to {found.max()}"
    )
  return found


def read(path: pathlib.Path, config: ModelConfig, format: Nested) -> np.ndarray:
  """Reads a plan from a JSON file; raises a ValueError as `check`."""
  try:
    plan = typed.parse(path.read_text("utf-8"), f"the plan of bits {path}")["bits"]
  except KeyError as error:
    raise ValueError(f'the plan of bits {path} has no "bits"') from error
  return check(plan, config, format)


def to_json(plan: np.ndarray) -> str:
  """Returns a plan as the text that `read` reads."""
  rows = ",\n    ".join(map(json.dumps, plan.tolist()))
  return f'{{\n  "mean_bits": {plan.mean():.6g},\n  "bits": [\n    {rows}\n  ]\n}}\n'


def num_bytes(plan: np.ndarray, config: ModelConfig, format: Nested) -> int:
  """Returns the bytes of the experts' matrices when each is read to its bits."""

  def of(bits):
    own = config.replace(expert_format=format.first(int(bits)).name)
    experts = params_lib.abstract(own).layers.experts
    return sum(a.size * a.dtype.itemsize for n in CONTRACTED for a in _leaves(experts, n))

  return sum(
    of(bits) * count // plan.size for bits, count in zip(*np.unique(plan, return_counts=True))
  )


def apply(matrix: Quantized, plan: np.ndarray) -> Quantized:
  """Returns a matrix `[L, E, ...]` on the host without the planes after each expert's bits.

  Their bits and scales are zero, so that they add nothing wherever all planes are read.
  """
  format = quantization.nested_format(matrix.format)

  def cut(array, size, kept):
    parts = array.reshape(*array.shape[:-1], size, -1)
    index = np.arange(size)[:, None] < kept.reshape(*kept.shape, *[1] * (parts.ndim - 2))
    return np.where(index, parts, np.zeros((), array.dtype)).reshape(array.shape)

  return matrix.replace(
    codes=cut(matrix.codes, format.bits, plan),
    scales=cut(matrix.scales, format.num_scales, plan - format.base + 2),
  )


def _leaves(experts, name):
  return jax.tree.leaves(getattr(experts, name))


def _of_layers(of, scores):
  return np.repeat(np.asarray(scores, np.float64)[:, None], of.config.num_experts, axis=1)


def _counts(of, roster):
  """Returns how often any member of a roster chose each expert, `[L, E]`."""
  found = np.zeros((of.config.num_expert_layers, of.config.num_experts), np.int64)
  for request, sequence in enumerate(of.sequences):
    chosen = diagnostics.at_all_positions(
      _chosen, of.params, of.config, roster, [sequence], [request]
    )[:, :, 0, : len(sequence)]
    for row, experts in zip(found, chosen.reshape(len(chosen), -1)):
      row += np.bincount(experts, minlength=len(row) + 1)[: len(row)]  # E stands for none
  return found


@functools.partial(jax.jit, static_argnames="config")
def _chosen(params, config, roster, cache, tokens, request_ids):
  keep = ("experts",)
  return diagnostics.states(params, config, roster, cache, tokens, request_ids, keep)[1].experts


def _turns(of):
  params, config = of.params, of.config
  of_stack = params.layers
  zeros = of_stack.experts.replace(down=jnp.zeros_like(of_stack.experts.down))
  without = params.replace(layers=of_stack.replace(experts=zeros))
  run = jax.jit(transformer.run_layers, static_argnames=("config", "options"))
  turns = np.zeros(config.num_expert_layers)
  for sequence in of.sequences:
    tokens = jnp.asarray([sequence], jnp.int32)
    batch = TokenBatch(jnp.arange(tokens.shape[1])[None])
    x = transformer.embed(params, config, tokens)
    for layer in range(config.num_layers):
      options = LayerOptions((layer, layer + 1), strategy="padded")
      after = run(params, config, x, batch, options=options)[0]
      if layer >= config.first_dense_layers:
        before = run(without, config, x, batch, options=options)[0]
        a, b = (np.asarray(v, np.float64)[0, :, : config.d_model] for v in (before, after))
        cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        turns[layer - config.first_dense_layers] += (1 - cosines).mean()
      x = after
  return turns / len(of.sequences)
