"""The gates that a roster's members have on average, in closed form: a roster in one pass.

Of E experts with logits w and Gumbel noise, expert i is chosen first with probability
softmax(w / τ)_i, and later ones likewise among the rest (Plackett-Luce). The mean of gates that
depend on the choice alone is thus a finite sum over ordered choices. That of a softmax over noisy
logits has no such form, and is integrated numerically.
"""

import itertools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from experiments.vision.routed_network import dense_gates
from roe_jax import routing
from roe_jax.config import ModelConfig

NODES = 5  # of the quadrature along each expert's noise


class MeanRoute(struct.PyTreeNode):
  """Choices of all experts with the members' mean gates under Gumbel noise.

  For few experts: E! / (E - A)! choices, or `NODES`^E nodes with noisy gates, which must be those
  of all experts, are added up.

  Attributes:
    temperature: τ of all layers, above zero.
    config: the network's routing.
    gate_weights: as of the roster.

  Raises:
    ValueError: gates are noisy and of some experts only.
  """

  temperature: jax.Array | float
  config: ModelConfig = struct.field(pytree_node=False)
  gate_weights: str = struct.field(pytree_node=False)

  def __call__(self, layer, logits_BxHxWxE):
    del layer
    logits = logits_BxHxWxE.astype(jnp.float32)
    if self.gate_weights == routing.NOISY:
      if self.config.experts_per_token != self.config.num_experts:
        raise ValueError("noisy gates have a mean gate only if all experts are chosen")
      gates = _integrated(logits, self.temperature)
    else:
      gates = _enumerated(self.config, logits, self.temperature, self.gate_weights)
    return jnp.broadcast_to(jnp.arange(self.config.num_experts), gates.shape), gates


def _enumerated(config, logits, temperature, gate_weights):
  """Sums gates times probability over all ordered choices: `[..., E]`."""
  total = jnp.zeros_like(logits)
  for order in itertools.permutations(range(config.num_experts), config.experts_per_token):
    perturbed = jnp.full(config.num_experts, -jnp.inf)
    perturbed = perturbed.at[np.array(order)].set(-np.arange(len(order), dtype=np.float32))
    chosen = routing.route(config, logits, jnp.broadcast_to(perturbed, logits.shape), gate_weights)
    gates = dense_gates(*chosen, config.num_experts)
    total += order_probability(logits / temperature, order)[..., None] * gates
  return total


def order_probability(scaled_logits: jax.Array, order: tuple[int, ...]) -> jax.Array:
  """Returns the Plackett-Luce probability `[...]` of an ordered choice from w / τ `[..., E]`."""
  log_probability, rest = 0.0, scaled_logits
  for expert in order:
    log_probability += scaled_logits[..., expert] - jax.nn.logsumexp(rest, axis=-1)
    rest = rest.at[..., expert].set(-jnp.inf)
  return jnp.exp(log_probability)


def _integrated(logits, temperature):
  """Integrates softmax(w + τ G) by Gauss-Legendre quadrature in G's distribution function."""
  nodes, weights = np.polynomial.legendre.leggauss(NODES)
  gumbel, count = -np.log(-np.log((nodes + 1) / 2)), logits.shape[-1]
  products = lambda of_axis: np.array(list(itertools.product(of_axis, repeat=count)))

  def add(total, node):
    noise, weight = node
    noisy = logits + jnp.broadcast_to(temperature * noise, logits.shape)
    return total + weight * jax.nn.softmax(noisy), None

  nodes = jnp.float32(products(gumbel)), jnp.float32(products(weights / 2).prod(-1))
  return jax.lax.scan(add, jnp.zeros_like(logits), nodes)[0]
