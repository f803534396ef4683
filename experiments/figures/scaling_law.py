"""From losses to model sizes: the scaling law of Kaplan et al. (arXiv 2001.08361).

With data and compute that do not limit it, the loss of a model of N non-embedding
parameters follows L(N) = (N_c / N)^α (eq. 1.1), in nats per token; α = 0.076 is their fit
to web text. A model whose loss is L then equals, by the law, one of N (L_of_it / L)^(1 / α)
parameters. The law speaks of dense models; for a Mixture of Experts N is taken as all of
its non-embedding parameters, those of all experts.
"""

import math

import jax
import numpy as np

from roe_jax import params as params_lib
from roe_jax.config import ModelConfig

KAPLAN = 0.076


def num_parameters(config: ModelConfig) -> int:
  """Non-embedding parameters, all experts included."""
  params = params_lib.abstract(config.replace(expert_format=None))
  total = sum(math.prod(w.shape) for w in jax.tree.leaves(params))
  return total - sum(
    math.prod(w.shape) for w in (params.embedding, params.unembedding) if w is not None
  )


def equivalent(
  size: float, loss: float | np.ndarray, other: float | np.ndarray, exponent: float
) -> float | np.ndarray:
  """The size of a model with loss `other`, where one of `size` has `loss`.

  Args:
    size: N, parameters.
    loss: of that model, nats per token.
    other: nats per token.
    exponent: α.
  """
  return size * (loss / other) ** (1 / exponent)


def fit_exponent(sizes: np.ndarray, losses: np.ndarray) -> float:
  """α by least squares of log L on log N.

  Args:
    sizes: `[M]` parameters of models of one family.
    losses: `[M]` nats per token.
  """
  slope, _ = np.polynomial.Polynomial.fit(np.log(sizes), np.log(losses), 1).convert().coef[::-1]
  return float(-slope)


def resized(config: ModelConfig, size: float) -> ModelConfig:
  """A model of the family with about so many non-embedding parameters: all widths grow together."""

  def scaled(factor):
    return config.replace(
      expert_format=None,
      d_model=round(config.d_model * factor),
      d_expert=round(config.d_expert * factor),
    )

  low, high = 0.05, 64.0
  for _ in range(40):
    middle = math.sqrt(low * high)
    low, high = (middle, high) if num_parameters(scaled(middle)) < size else (low, middle)
  return scaled(math.sqrt(low * high))
