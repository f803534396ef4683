"""Super-resolution with a mixture of stages, after SSIU (arXiv 2506.11823), on luminance.

An unfolding network: each block repeats the steps of an iterative solver with learned operators of
gated convolutions at two scales (a pixel, and its neighbors) and sparse attention. The features
after each stage are the experts of a selector that mixes them for each pixel and channel.
Differences from the published network: one color channel, less width and depth, a tail without full
convolutions (slow on CPUs), attention within windows without an overlap, and upsampling of pooled
features that does not depend on the image's size, so that tiles agree with the whole.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.vision import routed_network
from experiments.vision.routed_network import Route, RoutedNetwork
from roe_jax import routing
from roe_jax.config import ModelConfig
from roe_jax.roster import Roster

NONE, SOFT = "none", "soft"
# Selectors, and how many of three experts they choose for each pixel and channel. All sum to one.
SELECTORS = {NONE: None, SOFT: 3, "top1": 1, "top2": 2}
_POOL = 2  # pixels that attention pools along each side
FOURIER_WEIGHT = 0.01


def resize(images_BxHxW: jax.Array, factor: float, method: str = "cubic") -> jax.Array:
  """Returns images enlarged or reduced by a factor, the latter without aliasing."""
  b, h, w = images_BxHxW.shape
  size = (b, round(h * factor), round(w * factor))
  return jax.image.resize(images_BxHxW, size, method, antialias=True)


def _padded(x, radius):
  return jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="reflect")


class _Neighbors(nn.Module):
  """A depthwise 3x3 convolution, as sums of shifts: XLA's has a slow gradient on CPUs."""

  @nn.compact
  def __call__(self, x):
    _, h, w, c = x.shape
    kernel = self.param("kernel", nn.initializers.normal(1 / 3), (3, 3, 1, 1, 1, c))
    bias = self.param("bias", nn.initializers.zeros, (1, 1, 1, c))
    x = jax.lax.optimization_barrier(_padded(x, 1))  # or each shift would pad again
    return bias + sum(kernel[i, j] * x[:, i : i + h, j : j + w] for i in range(3) for j in range(3))


class MixedScaleGating(nn.Module):
  """gelu(1x1(x)) * 1x1(3x3 depthwise(1x1(x))), projected."""

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    context = nn.Dense(width)(_Neighbors()(nn.Dense(width)(x)))
    return nn.Dense(width)(nn.gelu(nn.Dense(width)(x)) * context)


class SparseAttention(nn.Module):
  """Attention among the pooled pixels of a window, upsampled.

  Attributes:
    window: side of a window, in pooled pixels.
    heads: H.
  """

  window: int
  heads: int

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    pooled = x.reshape(b, h // _POOL, _POOL, w // _POOL, _POOL, c).max((2, 4))
    s, rows, columns = self.window, h // (_POOL * self.window), w // (_POOL * self.window)
    windows = pooled.reshape(b, rows, s, columns, s, c).swapaxes(2, 3).reshape(-1, s * s, c)
    heads = (self.heads, c // self.heads)
    q, k, v = (
      nn.DenseGeneral(heads, use_bias=False, name=name)(windows) for name in ("q", "k", "v")
    )
    k += self.param("position", nn.initializers.normal(0.02), (1, s * s, *heads))
    weights = jax.nn.softmax(jnp.einsum("nihd,njhd->nhij", q, k) * heads[1] ** -0.5)
    mixed = jnp.einsum("nhij,njhd->nihd", weights, v)
    mixed = mixed.reshape(b, rows, columns, s, s, c).swapaxes(2, 3)
    mixed = _Neighbors()(mixed.reshape(b, h // _POOL, w // _POOL, c))
    return jax.image.resize(mixed, x.shape, "bilinear")


class UnfoldingBlock(nn.Module):
  """One step of the solver, from the estimate `a` and the observation `y`."""

  window: int
  heads: int

  @nn.compact
  def __call__(self, a, y):
    a = nn.LayerNorm()(a)
    z, b = MixedScaleGating()(a), MixedScaleGating()(a)
    v = a + z + y
    v = v + SparseAttention(self.window, self.heads)(v)
    a = MixedScaleGating()(v - b) + b
    return a + MixedScaleGating()(a)


class Selector(nn.Module):
  """Mixes stages e_j by gates of the logits w_j = 1x1_j(e_j), for each pixel and channel.

  The channels of a pixel share its noise.

  Attributes:
    routing: of a channel; None for the last stage alone.
  """

  routing: ModelConfig | None

  @nn.compact
  def __call__(self, stages, route):
    if self.routing is None:
      mixed = stages[-1]
    else:
      width, count = stages[0].shape[-1], self.routing.num_experts
      logits = jnp.stack([nn.Dense(width, name=f"gate_{j}")(e) for j, e in enumerate(stages)], -1)
      experts, gates = jax.vmap(route, in_axes=(None, 3), out_axes=3)(0, logits)
      gates = routed_network.dense_gates(experts, gates, count)
      if self.routing.experts_per_token == 1:  # a gate of one, with the gradient of its softmax
        p = jax.nn.softmax(logits)
        gates *= 1 + p - jax.lax.stop_gradient(p)
      mixed = jnp.einsum("bhwce,ebhwc->bhwc", gates, jnp.stack(stages))
    return mixed + nn.Dense(stages[0].shape[-1], name="fuse")(mixed)


class SuperResolution(RoutedNetwork):
  """The network: luminance `[B, H, W]` to `[B, scale H, scale W]`.

  H and W must be multiples of `unit`; see `upscale`.

  Attributes:
    scale: enlargement of each side.
    selector: a name in `SELECTORS`.
    width: C, channels.
    stages: number of stages, the experts.
    blocks: in each stage.
    window: of attention, in pooled pixels.
    heads: of attention.
  """

  scale: int
  selector: str = SOFT
  width: int = 16
  stages: int = 3
  blocks: int = 1
  window: int = 4
  heads: int = 2

  @property
  def routing(self) -> ModelConfig:
    """Routing of the selector; the network without selector has one that it does not use."""
    chosen = SELECTORS[self.selector] or 1
    return routed_network.routing_config(1, self.stages, min(chosen, self.stages), True)

  @property
  def gate_weights(self) -> str:
    """Gates that noise has an effect on: of all experts, only noisy ones differ."""
    return routing.NOISY if self.routing.experts_per_token == self.stages else routing.CLEAN

  @property
  def unit(self) -> int:
    """Pixels that the sides of an image are padded to multiples of."""
    return _POOL * self.window

  @property
  def margin(self) -> int:
    """Pixels, a multiple of `unit`, beyond which the input does not affect an output."""
    # Per block: three 3x3 convolutions in sequence, the window, and around it a pooled 3x3
    # convolution and the upsampling.
    radius = 2 + self.stages * self.blocks * (3 + (self.unit - 1) + 2 * _POOL)
    return -(-radius // self.unit) * self.unit

  def setup(self):
    self.first = nn.Conv(self.width, (3, 3), padding="VALID")
    # Unrolled: a scan over blocks has a gradient of three times the time on CPUs.
    self.body = [UnfoldingBlock(self.window, self.heads) for _ in range(self.stages * self.blocks)]
    self.select = Selector(None if self.selector == NONE else self.routing)
    self.widen, self.spread = nn.Dense(2 * self.width), _Neighbors()
    self.last = nn.Dense(self.scale**2, kernel_init=nn.initializers.normal(1e-3))

  def trunk(self, images):
    """Returns the images, their first features, and the features after each stage."""
    first = a = self.first(_padded(images[..., None], 1))
    after_blocks = [a := block(a, first) for block in self.body]
    return images, first, after_blocks[self.blocks - 1 :: self.blocks]

  def routed(self, features, route: Route):
    images, first, stages = features
    return images, first + self.select(stages, route)

  def head(self, features):
    images, x = features
    b, h, w = images.shape
    # Pixels are shuffled last, so that x4 costs about as much as x2.
    residual = self.last(nn.gelu(self.spread(self.widen(x))))
    residual = residual.reshape(b, h, w, self.scale, self.scale).swapaxes(2, 3)
    residual = residual.reshape(b, h * self.scale, w * self.scale)
    return residual + resize(images, self.scale, "bilinear")


def loss(predicted: jax.Array, wanted: jax.Array) -> jax.Array:
  """Returns the mean absolute error of pixels, and 0.01 times that of Fourier coefficients."""
  error = predicted - wanted
  spectrum = jnp.fft.rfft2(error)
  fourier = (jnp.abs(spectrum.real) + jnp.abs(spectrum.imag)).mean() / 2
  return jnp.abs(error).mean() + FOURIER_WEIGHT * fourier


def upscale(
  network: SuperResolution,
  params: Any,
  image_HxW: np.ndarray,
  roster: Roster,
  tile: int | None = None,
) -> np.ndarray:
  """Returns an image of any size, enlarged by a roster.

  Args:
    network, params: the network.
    image_HxW: float32 luminance.
    roster: of `network.routing`, with `MEAN_VALUE`.
    tile: side of the tiles in which large images are computed, without the margin that is
      computed with each, a multiple of `network.unit`; None: at once. Results are equal up to
      rounding, since noise belongs to a pixel.

  Returns:
    `[scale H, scale W]` float32.

  Raises:
    ValueError: `tile` is not a multiple of the unit.
  """
  if tile is not None and (tile <= 0 or tile % network.unit):
    raise ValueError(f"tile must be a positive multiple of {network.unit} pixels, got {tile}")
  height, width = image_HxW.shape
  padding = [(0, -side % network.unit) for side in (height, width)]
  image = np.pad(np.asarray(image_HxW, np.float32), padding, mode="symmetric")
  ids, s = np.array([routed_network.image_id(image_HxW)], np.uint32), network.scale
  enlarged = np.zeros([s * side for side in image.shape], np.float32)
  sizes = [min(side, tile + 2 * network.margin) if tile else side for side in image.shape]
  for row in range(0, image.shape[0], tile or image.shape[0]):
    for column in range(0, image.shape[1], tile or image.shape[1]):
      # All tiles have one shape: those at an edge begin further inside.
      origin = [
        max(0, min(at - network.margin, side - size))
        for at, side, size in zip((row, column), image.shape, sizes)
      ]
      part = image[tuple(slice(o, o + size) for o, size in zip(origin, sizes))]
      found = routed_network.predict(network, params, part[None], roster, ids, np.array([origin]))
      kept = [
        slice(s * at, s * min(side, at + (tile or side)))
        for at, side in zip((row, column), image.shape)
      ]
      inside = [slice(k.start - s * o, k.stop - s * o) for k, o in zip(kept, origin)]
      enlarged[tuple(kept)] = np.asarray(found[0])[tuple(inside)]
  return enlarged[: s * height, : s * width]


def self_ensemble(function: Any, images_BxHxW: jax.Array, count: int = 8) -> jax.Array:
  """Returns the mean output over the first `count` of eight flips and rotations of the input."""
  total = 0.0
  for index in range(count):
    turns, flip = index // 2, index % 2
    turned = jnp.rot90(images_BxHxW, turns, axes=(1, 2))
    found = function(turned[:, :, ::-1] if flip else turned)
    total += jnp.rot90(found[:, :, ::-1] if flip else found, -turns, axes=(1, 2))
  return jnp.asarray(total / count)
