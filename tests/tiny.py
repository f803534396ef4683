"""Models small enough for tests, with weights large enough to matter."""

import hf
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import params as params_lib
from roe_jax.families import from_hugging_face


def config(family, **changes):
  """A model with grouped query attention and room for 48 tokens."""
  config = from_hugging_face(
    hf.config_json(family, vocab_size=61, num_hidden_layers=3, max_position_embeddings=48)
  )
  sizes = dict(
    head_dim=config.head_dim if config.kv_lora_rank else 8,
    experts_per_token=min(3, config.num_experts),
    bos_token_id=None,
    pad_token_id=None,
    eos_token_ids=(),
  )
  return config.replace(**(sizes | changes))


def params(config, seed=0, scale=0.3):
  """Random parameters: no norm is one, and logits and routing vary widely."""
  random = np.random.RandomState(seed)

  def value(spec):
    array = (
      random.uniform(0.5, 1.5, spec.shape)
      if spec.init == "ones"
      else scale * random.standard_normal(spec.shape)
    )
    return jnp.asarray(array, spec.dtype or config.dtype)

  return jax.tree.map(value, params_lib.describe(config))


def texts(lengths, vocab_size=61, seed=0):
  """Random token ids, one list for each length."""
  random = np.random.RandomState(seed)
  return [random.randint(0, vocab_size, length).tolist() for length in lengths]
