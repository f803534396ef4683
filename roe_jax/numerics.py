"""Contractions and normalisation with stated precision."""

import jax
import jax.numpy as jnp


def einsum(subscripts: str, x: jax.Array, weights: jax.Array) -> jax.Array:
  """`jnp.einsum` accumulated in float32; the result is float32.

  float32 operands are multiplied in full float32 on every platform (the
  default of GPUs and TPUs is shorter), bfloat16 ones as they are. Let axes
  that both operands and the result share lead the result of a matmul: with
  others in front, XLA's CPU backend fails on some bfloat16 dots.
  """
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.einsum(subscripts, x, weights, precision=precision,
                    preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
  """Root-mean-square normalisation over the axes that `weight` has.

  Computed in float32 and rounded to the dtype of `x` before the weight is
  applied, as OLMoE and Mixtral do.

  Args:
    x: `[..., *weight.shape]`.
    weight: normalises jointly over all its axes.
    epsilon: added to the mean square.
  """
  axes = tuple(range(-weight.ndim, 0))
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
  normed = (x32 * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)
  return normed * jnp.broadcast_to(weight, x.shape)
