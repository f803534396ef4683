"""Expert feed-forward networks: several strategies behind one function.

For each token, all strategies compute the gate-weighted sum of the outputs of its active
experts, `down(activation(gate x, up x))` plus biases if the model has them. None drops
tokens. They differ in how often they read an expert's weights and where they run:

* `native`: a kernel in C++ that reads each unique active expert once. For CPUs where a C++
  compiler is installed.
* `tiled_loop`: a loop over the unique active experts. Each tile of their weights is read
  once and multiplied with the expert's tokens block by block. For CPUs.
* `dense`: every expert for every token, as batched matmuls. For rosters on accelerators,
  where most experts are active anyway.
* `gather_gemv`: kernels over (token, choice) pairs. For few tokens on accelerators.
* `grouped_matmul`: kernels over blocks of tokens of one expert. For many tokens on
  accelerators.
* `padded`: such blocks as one batched matmul with gathered weights. Differentiable; for
  training and small models.
* `ragged_dot`, and `tokamax` where that package is installed: grouped matmul by
  `jax.lax.ragged_dot` and `tokamax.ragged_dot`.

The only expert of a dense model is computed without dispatch (`every_token.only`), whatever the
strategy, unless it is quantized.

`native`, `tiled_loop`, `gather_gemv` and `grouped_matmul` dequantize quantized experts as they
read them; the others dequantize all experts of a layer, and are not chosen for them. In nested
formats `native` reads up to four bits so, `tiled_loop` any number, and the others none.

`choices` says which strategy is chosen.
"""

import functools
from importlib import util

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import collectives, kernel_check, native
from roe_jax.experts import (
  choices,
  every_token,
  expert_parallel,
  gather_gemv,
  grouped_matmul,
  native_kernel,
  tiled_loop,
)
from roe_jax.experts.activation import Activation
from roe_jax.experts.batched_matmul import dense, padded
from roe_jax.experts.every_token import shared
from roe_jax.numerics import rounded, to_compute_dtype
from roe_jax.params import ExpertParams
from roe_jax.quantization import (
  CONTRACTED,
  codes_per_row,
  dequantize_layer,
  find,
  is_quantized,
  quantize,
  read_format,
)

_FUNCTIONS = {
  "native": native_kernel.compute,
  "tiled_loop": tiled_loop.compute,
  "dense": dense,
  "gather_gemv": gather_gemv.compute,
  "grouped_matmul": grouped_matmul.compute,
  "padded": padded,
  "ragged_dot": grouped_matmul.by_ragged_dot,
}
if util.find_spec("tokamax") is not None:
  _FUNCTIONS["tokamax"] = grouped_matmul.by_tokamax
STRATEGIES = tuple(_FUNCTIONS)
# By platform, of the last axis of weights: on TPUs XLA would copy others into another layout in
# every call.
MULTIPLES = {"cpu": native.MULTIPLE, "tpu": 128}


def check_strategy(strategy: str | None) -> None:
  """Raises a ValueError for a strategy that is not in `STRATEGIES`."""
  if strategy is not None and strategy not in STRATEGIES:
    raise ValueError(f"unknown expert strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")


def choose_strategy(
  num_tokens: int,
  experts_per_token: int,
  num_experts: int,
  dtype: str = "float32",
  platform: str | None = None,
  expert_format: str | None = None,
  width: int = 128,
) -> str:
  """Chooses the strategy for a static number of tokens on `platform` (default: the backend).

  The first of `choices.steps` that holds. One other than `dense` and `tiled_loop`, which
  run anywhere, must also pass `kernel_passes`, and the weights' last axis (`width`) must be a
  multiple of `MULTIPLES`.
  """
  kind = platform or jax.default_backend()
  if kind == jax.default_backend() != "cpu":
    kind = jax.devices()[0].device_kind
  platform = platform or jax.default_backend()
  runs_anywhere = ("tiled_loop", "dense")
  for step in choices.steps(kind, platform, expert_format or dtype):
    if step.holds(num_tokens, experts_per_token, num_experts) and (
      step.strategy in runs_anywhere
      or (
        width % MULTIPLES.get(platform, 1) == 0
        and (step.strategy != "native" or _has_native(expert_format))
        and kernel_passes(step.strategy, dtype, expert_format)
      )
    ):
      return step.strategy
  raise AssertionError("the last step always holds")


def _has_native(expert_format):
  reads = expert_format is None or native_kernel.dequantizes(expert_format)
  return reads and native.is_available()


@functools.cache
def kernel_passes(strategy: str, dtype: str, expert_format: str | None = None) -> bool:
  """Checks a strategy against `dense` on this machine's device, on a small case."""
  error = functools.partial(_error, strategy, dtype, expert_format)
  if strategy == "native":
    error = functools.partial(native.remembered, f"experts_{expert_format or dtype}", error)
  return kernel_check.passes(
    error,
    # TPU kernels round dequantized weights once more.
    tolerance=2e-2 if dtype == "bfloat16" else 1e-4,
    what=f"the expert strategy {strategy!r} in {dtype}"
    + (f" with experts in {expert_format}" if expert_format else ""),
    instead=repr("tiled_loop" if expert_format or strategy == "native" else "dense"),
  )


def _error(strategy, dtype, expert_format):
  """Returns the largest error on a small case, relative to the largest value."""
  num_experts, d, f, tokens, choices = 4, 256, 128, 32, 2
  keys = jax.random.split(jax.random.key(0), 6)

  def normal(key, *shape):
    return np.asarray(jax.random.normal(key, (2 * num_experts, *shape)) / 16)

  matrices = {"gate_up": normal(keys[0], f, 2, d), "down": normal(keys[1], f, d)}
  if expert_format is not None:
    matrices = {name: quantize(w, expert_format, CONTRACTED[name]) for name, w in matrices.items()}
  else:
    matrices = {name: jnp.asarray(w, dtype) for name, w in matrices.items()}
  weights = ExpertParams(
    **matrices,
    gate_up_bias=jnp.asarray(normal(keys[2], f, 2), dtype),
    down_bias=jnp.asarray(normal(keys[3], d), dtype),
  )
  x = jax.random.normal(keys[4], (tokens, d), dtype)
  gates, indices = jax.lax.top_k(jax.random.uniform(keys[5], (tokens, num_experts)), choices)

  def run(name):
    def compute(weights, *tokens):
      activation = Activation(limit=1.0, alpha=1.7)
      return _function(name, num_experts, activation, weights, 1, x.dtype)(*tokens)

    return np.asarray(jax.jit(compute)(weights, x, indices, gates), np.float32)

  actual, expected = run(strategy), run("dense")
  return np.abs(actual - expected).max() / np.abs(expected).max()


@jax.named_scope("experts")
def apply(
  experts: ExpertParams,
  layer: jax.Array | int,
  x_NxD: jax.Array,
  indices_NxA: jax.Array,
  gates_NxA: jax.Array,
  strategy: str | None = None,
  activation: Activation = Activation(),
  tokens_sharded: bool = False,
) -> jax.Array:
  """Returns the gate-weighted sum of the active experts' outputs.

  Under `vmap` with shared weights, as in a roster, the mapped axis is folded into the
  tokens (token-major, member-minor), so that an expert's weights are read once for all
  members. That rule has no reverse mode; `padded` and `dense` do not use it and are
  differentiable.

  Args:
    experts: weights of all layers.
    layer: index of the layer; may be traced.
    x_NxD: tokens.
    indices_NxA: int32 active experts of each token; E for none, with a gate of zero.
    gates_NxA: float32 gate weights.
    strategy: one of `STRATEGIES`, or None to choose by platform and shapes.
    activation: activation between the projections.
    tokens_sharded: see `expert_parallel.apply`.

  Returns:
    `[N, D]` in the dtype of `x_NxD`; products are accumulated in float32.

  Raises:
    ValueError: an unknown strategy.
  """
  check_strategy(strategy)
  l, e = jax.tree.leaves(experts.gate_up)[0].shape[:2]
  devices = collectives.axis_size("expert")
  if e * devices == 1 and not is_quantized(experts.down):
    return every_token.only(experts, layer, x_NxD, gates_NxA, activation)
  experts = jax.tree.map(lambda w: w.reshape(l * e, *w.shape[2:]), experts)
  compute = _with_member_folding(e, activation, strategy, devices, tokens_sharded)
  return compute(experts, jnp.asarray(layer), x_NxD, indices_NxA, gates_NxA)


def _reads(strategy, expert_format):
  """Whether a strategy dequantizes what it reads of a layer, not the whole layer first."""
  if strategy == "native":
    return native_kernel.dequantizes(expert_format)
  if find(expert_format).nested:
    return strategy in ("tiled_loop", "ragged_dot", "tokamax")
  return strategy not in ("padded", "dense")


def _function(strategy, num_experts, activation, weights, layer, dtype):
  """Returns a strategy as a function of tokens, with weights in the dtype that it takes."""
  if is_quantized(weights.down) and not _reads(strategy, read_format(weights.down)):
    weights, layer = dequantize_layer(weights, layer, num_experts, dtype), 0
  if strategy not in ("native", "tiled_loop"):  # these read bfloat16 bits
    weights = jax.tree.map(to_compute_dtype, weights)
  return functools.partial(_FUNCTIONS[strategy], num_experts, activation, weights, layer)


def _not_differentiable(compute):
  """Returns the function with an error where it is differentiated."""
  function = jax.custom_jvp(compute)

  @function.defjvp
  def _(primals, tangents):
    del primals, tangents
    raise ValueError(
      "this expert strategy is not differentiable: pass a differentiable one, such as "
      'strategy="padded" to forward or expert_strategy="padded" to Roster.create (for quantized '
      "experts, dequantize them first)"
    )

  return function


@functools.cache
def _with_member_folding(num_experts, activation, strategy, devices, tokens_sharded):
  """Returns the strategy's function with a vmap rule that folds the mapped axis into tokens."""

  def compute(weights, layer, x, indices, gates):
    width, expert_format = codes_per_row(weights.down), read_format(weights.down)

    def local_experts(num_tokens, num_choices):
      dtype, sizes = str(x.dtype), (num_tokens, num_choices, num_experts * devices)
      chosen = strategy or choose_strategy(*sizes, dtype, width=width, expert_format=expert_format)
      function = _function(chosen, num_experts, activation, weights, layer, x.dtype)
      if chosen == "gather_gemv":  # index E (no expert) must be valid too
        return lambda x, indices, gates: function(x, jnp.minimum(indices, num_experts - 1), gates)
      return function

    if devices * collectives.axis_size("tensor") == 1:
      return rounded(local_experts(*indices.shape)(x, indices, gates), x.dtype)

    def local(x, indices, gates):
      return local_experts(*indices.shape)(x, indices, gates)

    return expert_parallel.apply(
      local, num_experts, x, indices, gates, tokens_sharded, differentiable
    )

  differentiable = strategy in ("padded", "dense")
  if differentiable:
    return compute
  folding = jax.custom_batching.custom_vmap(_not_differentiable(compute))

  @folding.def_vmap
  def _(axis_size, in_batched, weights, layer, x, indices, gates):
    if any(jax.tree.leaves(in_batched[:2])):
      raise ValueError("experts.apply supports vmap over tokens, but not over weights or layers")

    def fold(a, is_batched):
      a = a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
      return a.swapaxes(0, 1).reshape(-1, a.shape[-1])

    y = folding(weights, layer, *map(fold, (x, indices, gates), in_batched[2:]))
    return y.reshape(-1, axis_size, y.shape[-1]).swapaxes(0, 1), True

  return folding
