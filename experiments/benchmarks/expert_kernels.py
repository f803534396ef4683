"""Expert strategies on one layer of published models: error, time, and ratio to the floor."""

from collections.abc import Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import floors, random_models
from experiments.benchmarks.floors import Rates
from experiments.benchmarks.supervisor import Case
from roe_jax import experts, native, presets, quantization
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.experts import Activation
from roe_jax.numerics import to_compute_dtype

MODELS = ("olmoe-1b-7b", "gpt-oss-20b", "qwen3-30b-a3b", "mixtral-8x7b")
FORMATS = ("bfloat16", "mxfp4", "int8", "int4", "float32")
NUM_TOKENS = (1, 64, 8, 256, 32, 2048)
# First what the models are published in, then the most common ways to fit them.
FIRST = (
  ("olmoe-1b-7b", "bfloat16"),
  ("gpt-oss-20b", "mxfp4"),
  ("olmoe-1b-7b", "int8"),
  ("olmoe-1b-7b", "int4"),
  ("qwen3-30b-a3b", "bfloat16"),
  ("mixtral-8x7b", "bfloat16"),
)
# Numbers of tokens for which a strategy may be the fastest; others come last.
PROMISING = {
  "native": (1, 64),
  "gather_gemv": (1, 64),
  "dense": (8, 256),
  "grouped_matmul": (8, 2048),
  "ragged_dot": (64, 2048),
  "tokamax": (8, 2048),
  "tiled_loop": (1, 64),
}
LAYERS, DRAWS = 2, 8  # steps take turns, so that caches do not hold a step's experts
TAU, MEMBERS = 0.5, 64  # of the rosters whose routing is drawn
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def config_of(model: str, format: str, toy: bool) -> ModelConfig:
  """Returns a model whose experts have this format: a dtype, or one of `quantization.FORMATS`."""
  quantized = format in quantization.FORMATS
  config = presets.PRESETS[model].replace(
    num_layers=LAYERS,
    sliding_layers=(),
    sliding_window=None,
    dtype="bfloat16" if quantized else format,
    expert_format=format if quantized else None,
  )
  return config.replace(d_model=128, d_expert=64) if toy else config


def draw_routing(config: ModelConfig, num_tokens: int) -> tuple[jax.Array, jax.Array]:
  """Draws experts and gates as of rosters at τ = 0.5 on standard normal router logits.

  Each `MEMBERS` consecutive tokens are the members of one roster, the first of them clean.

  Returns:
    `[DRAWS, N, A]` int32 and float32.
  """
  of_logits, of_noise = jax.random.split(jax.random.key(0))
  sequences = -(-num_tokens // MEMBERS)
  shape = (DRAWS, sequences, MEMBERS, config.num_experts)
  logits = jax.random.normal(of_logits, (*shape[:2], 1, shape[3]))
  noise = TAU * jax.random.gumbel(of_noise, shape).at[:, :, 0].set(0)
  gates, indices = jax.lax.top_k(logits + noise, config.experts_per_token)
  gates = jax.nn.softmax(gates, axis=-1)
  shape = (DRAWS, sequences * MEMBERS, config.experts_per_token)
  return indices.reshape(shape)[:, :num_tokens], gates.reshape(shape)[:, :num_tokens]


@functools.partial(jax.jit, static_argnums=(0, 1))
def reference(num_experts, activation, weights, x, indices, gates):
  """Returns layer 0 of `experts.apply`, expert by expert in float32."""
  x = x.astype(jnp.float32)

  def expert(i):
    one = jax.tree.map(lambda w: w[0, i], weights)
    return jax.tree.map(
      lambda w: (
        quantization.dequantize(w)
        if quantization.is_quantized(w)
        else to_compute_dtype(w).astype(jnp.float32)
      ),
      one,
      is_leaf=quantization.is_quantized,
    )

  def add(i, total):
    w = expert(i)
    projected = jnp.einsum("nd,fcd->cnf", x, w.gate_up, precision="highest")
    if w.gate_up_bias is not None:
      projected += w.gate_up_bias.T[:, None]
    out = jnp.dot(activation(*projected), w.down, precision="highest")
    if w.down_bias is not None:
      out += w.down_bias[None]
    return total + jnp.where(indices == i, gates, 0).sum(-1)[:, None] * out

  return jax.lax.fori_loop(0, num_experts, add, jnp.zeros(x.shape, jnp.float32))


class Layer:
  """A layer of one model and format, its tokens and their reference."""

  def __init__(self, model: str, format: str, toy: bool, num_tokens: int):
    self._toy, self.config = toy, config_of(model, format, toy)
    config = self.config
    specs = params_lib.describe(config).layers.experts
    self.weights: Any = params_lib.in_storage_dtype(random_models.random_arrays(specs, config))
    self.activation = Activation(config.swiglu_limit, config.swiglu_alpha)
    self.x = jax.random.normal(jax.random.key(1), (num_tokens, config.d_model), config.dtype)
    self.indices, self.gates = draw_routing(config, num_tokens)
    self.expected = np.asarray(
      reference(
        config.num_experts, self.activation, self.weights, self.x, self.indices[0], self.gates[0]
      )
    )

  @functools.cached_property
  def expert_bytes(self) -> float:
    """Bytes of one expert."""
    matrices = jax.tree.leaves((self.weights.gate_up, self.weights.down))
    return sum(w.nbytes for w in matrices) / (LAYERS * self.config.num_experts)

  def work(self, num_tokens: int) -> tuple[float, float, float]:
    """Returns a step's mean unique active experts, the bytes it must read, and its FLOPs."""
    config = self.config
    draws = np.asarray(self.indices[:, :num_tokens]).reshape(DRAWS, -1)
    unique = float(np.mean([len(np.unique(draw)) for draw in draws]))
    pairs = num_tokens * config.experts_per_token
    return unique, unique * self.expert_bytes, 6.0 * pairs * config.d_model * config.d_expert

  def measure(self, strategy: str, num_tokens: int, rates: Rates) -> dict[str, Any]:
    """Returns the record of a strategy: its error against the reference, and its time."""
    config = self.config
    unique, num_bytes, flops = self.work(num_tokens)
    # In toy runs the kernels are interpreted, which takes long.
    steps = 4 if self._toy else floors.steps_for(rates.floor(num_bytes, flops))
    indices, gates = self.indices[:, :num_tokens], self.gates[:, :num_tokens]

    @jax.jit
    def run(weights, x, indices, gates):
      def step(carry, i):
        x, first = carry
        y = experts.apply(
          weights, i % LAYERS, x, indices[i % DRAWS], gates[i % DRAWS], strategy, self.activation
        )
        # Each step needs the last one's result, which it hardly changes.
        return (x + y * 1e-6, jnp.where(i == 0, y, first)), None

      return jax.lax.scan(step, (x, jnp.zeros_like(x)), jnp.arange(steps))[0]

    def call():
      return run(self.weights, self.x[:num_tokens], indices, gates)

    _, y = call()
    expected = self.expected[:num_tokens]
    error = float(np.abs(np.asarray(y, np.float32) - expected).max() / np.abs(expected).max())
    seconds = floors.median_seconds(call) / steps
    differs = None
    if not error <= TOLERANCE[config.dtype]:
      differs = f"differs from the reference by {error:.1e} of the largest value"
    return {
      "strategy": strategy,
      "num_tokens": num_tokens,
      "experts_per_token": config.experts_per_token,
      "num_experts": config.num_experts,
      "unique_experts": unique,
      "error": error,
      "differs": differs,
      **rates.compare(seconds, num_bytes, flops),
      "steps": steps,
    }


class Layers:
  """What the stage opens: one `Layer` at a time, since several may not fit."""

  def __init__(self, toy: bool, rates: Rates):
    self._toy, self._rates = toy, rates
    self._key, self._layer = None, None

  def measure(self, model: str, format: str, strategy: str, num_tokens: int) -> dict[str, Any]:
    if self._layer is None or self._key != (model, format):
      self._key = self._layer = None  # freed before the next is made
      self._layer = Layer(model, format, self._toy, max(sizes(self._toy)))
      self._key = model, format
    found = self._layer.measure(strategy, num_tokens, self._rates)
    return {"model": model, "format": format} | found


def sizes(toy: bool) -> tuple[int, ...]:
  return (1, 8) if toy else NUM_TOKENS


def cases(toy: bool) -> list[Case]:
  """Returns all cases, most valuable first."""
  groups = [*FIRST, *(g for g in itertools.product(MODELS, FORMATS) if g not in FIRST)]
  if toy:
    groups = groups[:2]

  found = [
    Case(
      f"{model} {format} {n} {strategy}",
      functools.partial(_measure, model, format, strategy, n),
      40,
    )
    for (model, format), n in itertools.product(groups, sizes(toy))
    for strategy in PROMISING
    if strategy in experts.STRATEGIES and (strategy != "native" or native.is_available())
  ]
  first = promising(found)
  return first + [case for case in found if case not in first]


def promising(cases: Sequence[Case]) -> list[Case]:
  """Returns the cases in which a strategy may be the fastest."""

  def may_win(case):
    *_, n, strategy = case.name.split(" ")
    least, most = PROMISING[strategy]
    return least <= int(n) <= most

  return [case for case in cases if may_win(case)]


def _measure(model, format, strategy, num_tokens, layers):
  return layers.measure(model, format, strategy, num_tokens)
