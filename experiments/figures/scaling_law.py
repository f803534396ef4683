"""Converts losses to model sizes by the scaling law of Kaplan et al. (arXiv 2001.08361).

Without limits of data and compute, the loss of a model with N non-embedding parameters
follows L(N) = (N_c / N)^α (eq. 1.1), in nats per token; α = 0.076 is their fit to web text.
By this law, lowering a model's loss L to L' is worth a model of N (L / L')^(1 / α)
parameters. The law is about dense models; for a Mixture of Experts N counts the non-embedding
parameters of all experts.
"""

import math

import jax
import numpy as np

from roe_jax import params as params_lib
from roe_jax.config import ModelConfig

KAPLAN = 0.076


def num_parameters(config: ModelConfig) -> int:
  """Returns the number of non-embedding parameters, including all experts."""
  params = params_lib.abstract(config.unquantized())
  total = sum(math.prod(w.shape) for w in jax.tree.leaves(params))
  return total - sum(
    math.prod(w.shape) for w in (params.embedding, params.unembedding) if w is not None
  )


def equivalent(
  size: float, loss: float | np.ndarray, other: float | np.ndarray, exponent: float
) -> float | np.ndarray:
  """Returns the size of a model with loss `other`, given that one of `size` has `loss`.

  Args:
    size: N, parameters.
    loss: of that model, nats per token.
    other: nats per token.
    exponent: α.
  """
  return size * (loss / other) ** (1 / exponent)


def fit_exponent(sizes: np.ndarray, losses: np.ndarray) -> float:
  """Returns α by least squares of log L on log N.

  Args:
    sizes: `[M]` parameters of models of one family.
    losses: `[M]` nats per token.
  """
  slope, _ = np.polynomial.Polynomial.fit(np.log(sizes), np.log(losses), 1).convert().coef[::-1]
  return float(-slope)


def resized(config: ModelConfig, size: float) -> ModelConfig:
  """Scales all widths of a model to about `size` non-embedding parameters."""

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
