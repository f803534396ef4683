"""From the members' logits to one next-token distribution.

An aggregation is a function from member logits `[R, ..., V]` (float32) to
log-probabilities `[..., V]` (float32). Adding an entry to `AGGREGATIONS` makes
a new one available under its name everywhere.
"""

import jax
import jax.numpy as jnp


def mean_probability(logits: jax.Array) -> jax.Array:
  """The mean of the members' distributions, as in arXiv 2509.17238.

  log mean_i p_i = logsumexp_i(log_softmax(logits_i)) - log n.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(logits.shape[0])


def mean_logit(logits: jax.Array) -> jax.Array:
  """The normalised geometric mean of the members' distributions."""
  return jax.nn.log_softmax(jnp.mean(logits, axis=0), axis=-1)


def majority(logits: jax.Array) -> jax.Array:
  """Each member votes for its most probable token.

  One more vote is spread as the mean distribution: it breaks ties between
  tokens with equally many votes and leaves no token without probability.
  """
  votes = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  total = jnp.logaddexp(jnp.log(votes.sum(axis=0)), mean_probability(logits))
  return total - jnp.log(logits.shape[0] + 1.0)


AGGREGATIONS = {
    "mean_probability": mean_probability,
    "mean_logit": mean_logit,
    "majority": majority,
}
