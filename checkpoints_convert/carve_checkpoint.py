"""Carves a dense model into a checkpoint with experts, and puts a carved one together again.

Layers are carved one after the other: each is calibrated on the outputs of the carved layers before
it. `carving` has the computation of one layer.
"""

from collections.abc import Iterable, Iterator, Mapping
import functools
import hashlib
import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import carving, hub, reading
from checkpoints_convert.carving import Plan
from checkpoints_convert.common import ConversionError, write_pieces
from roe_jax import attention, checkpoint, transformer, typed
from roe_jax import cache as kv_cache
from roe_jax import params as params_lib
from roe_jax.checkpoint_folder import CARVING_FILE, named_leaves
from roe_jax.config import ModelConfig
from roe_jax.layer_inputs import CacheAccess, TokenBatch
from roe_jax.numerics import project
from roe_jax.params import LayerParams
from roe_jax.routers import LINEAR, NEURONS, NONE
from roe_jax.routers import ROUTERS as ROUTER_KINDS
from roe_jax.text import utf8
from roe_jax.text.tokenizer import Tokenizer

ROUTERS = (LINEAR, NEURONS)
FINE_TUNING = "fine_tuning"  # in the provenance of a checkpoint whose weights were trained
TOKENS = 16384
_WINDOW = 512  # tokens of a calibration sequence


def carved_config(dense: ModelConfig, plan: Plan, router: str = LINEAR) -> ModelConfig:
  """Returns the config of a dense model after carving.

  Raises:
    ConversionError: the model is not dense, or cannot be divided so.
  """
  if dense.router != NONE:
    raise ConversionError(
      f"--carve makes experts of a dense model, but this {dense.family} model has "
      f"{dense.num_experts} experts per layer already: convert it without --carve"
    )
  if dense.expert_bias:
    raise ConversionError(
      "--carve does not support biases in feed-forward networks (mlp_bias in config.json)"
    )
  width = plan.width(dense.d_expert)
  if plan.active < 1:
    raise ConversionError(f"--carve={plan} has no active routed expert: give an A of at least 1")
  return dense.replace(
    router=router,
    router_bias=router == LINEAR,
    num_experts=plan.routed,
    experts_per_token=plan.active,
    d_expert=width,
    d_shared_expert=plan.shared * width,
    shared_expert_gate=False,
  )


def is_carved(config: ModelConfig) -> bool:
  """Whether a model's experts were carved out of a dense model."""
  return config.router != NONE and config.unit_gates


def dense_config(carved: ModelConfig) -> ModelConfig:
  """Returns the config of the dense model that a model was carved from.

  Raises:
    ConversionError: the gates have learned scales, so no dense model is equal.
  """
  if carved.gate_scales:
    raise ConversionError(
      "a carved model that has learned scales of its gates has no dense form: convert the model "
      "that it was fine-tuned from, or fine-tune with --gate_scales=false"
    )
  return carved.replace(
    router=NONE,
    router_bias=False,
    num_experts=1,
    experts_per_token=1,
    d_expert=carved.d_shared_expert + carved.num_experts * carved.d_expert,
    d_shared_expert=0,
    shared_expert_gate=True,
  )


def convert(
  source: str,
  target: str,
  *,
  plan: Plan,
  calibration: str | pathlib.Path,
  router: str = LINEAR,
  num_tokens: int = TOKENS,
  dtype: str = "source",
  revision: str | None = None,
  overwrite: bool = False,
  piece_bytes: int = checkpoint.PIECE_BYTES,
) -> ModelConfig:
  """Carves a dense model and returns the config of the checkpoint that is written.

  The checkpoint's carving.json says which neuron went where. An interrupted run repeats the
  computation, whose results are the same, and writes the missing pieces.

  Args:
    source: a dense Hugging Face model; see `hub.find`.
    target: the checkpoint folder to write.
    plan: the division of each layer.
    calibration: a text file in UTF-8.
    router: a name in `ROUTERS`.
    num_tokens: number of calibration tokens, rounded down to whole windows of 512.
    dtype: see `hub.open_source`.
    revision: branch, tag or commit on the hub.
    overwrite: whether to replace an existing checkpoint at `target`.
    piece_bytes: maximum size of a piece of several layers.

  Raises:
    ConversionError, ValueError: the source cannot be carved, or the text is too short.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, checkpoint.MANIFEST_FILE, source)
  if importlib.util.find_spec("scipy") is None:
    raise ConversionError(
      'carving needs scipy, which is not installed: pip install "roe_jax[experiments]"'
    )
  opened = hub.open_source(hub.find(source, revision), dtype)
  config = carved_config(opened.config, plan, router)
  tokens = calibration_tokens(Tokenizer.load(opened.folder), calibration, num_tokens, config)
  facts = {
    "plan": str(plan),
    "router": router,
    "calibration_tokens": tokens.size,
    "calibration_sha256": hashlib.sha256(np.int32(tokens).tobytes()).hexdigest(),
  }
  writer = checkpoint.Writer(
    target,
    config,
    files=opened.folder,
    provenance={
      "source": source,
      "revision": revision,
      "source_dtypes": list(opened.stored_dtypes),
      "dtype": config.dtype,
      "carving": facts,
    },
    fingerprint=opened.fingerprint + json.dumps(facts),
    piece_bytes=piece_bytes,
    overwrite=overwrite,
  )
  neurons: list[list[int]] = []

  def read(names):
    dense = ((piece, reading.read(opened, piece)) for piece in writer.pieces)
    for piece, arrays, divisions in carve(opened.config, config, dense, tokens, plan):
      neurons.extend(division.order.tolist() for division in divisions)
      if piece == writer.pieces[-1]:
        text = json.dumps(facts | {"neurons": neurons}) + "\n"
        (checkpoint.partial_folder(target) / CARVING_FILE).write_text(text, encoding="utf-8")
      if piece.name in names:
        yield piece, arrays

  write_pieces(writer, read, "carving")
  return config


def calibration_tokens(
  tokenizer: Tokenizer, text: str | pathlib.Path, count: int, config: ModelConfig
) -> np.ndarray:
  """Returns the first `count` tokens of a text file, cut into sequences `[B, T]`.

  Raises:
    ConversionError: the file cannot be read, or has fewer tokens.
  """
  try:
    read = utf8.read(pathlib.Path(text).expanduser())
  except (OSError, ValueError) as error:
    raise ConversionError(f"--calibration must be a text file in UTF-8: {error}") from error
  window = min(_WINDOW, config.context_length)
  if count < window:
    raise ConversionError(f"--calibration_tokens must be at least {window}, got {count}")
  tokens = tokenizer.encode(read, add_special_tokens=False)
  if len(tokens) < count:
    raise ConversionError(
      f"the calibration text {text} has {len(tokens)} tokens, fewer than --calibration_tokens="
      f"{count}: give a longer text or fewer tokens"
    )
  return np.asarray(tokens[: count // window * window], np.int32).reshape(-1, window)


def carve(
  dense: ModelConfig,
  carved: ModelConfig,
  pieces: Iterable[tuple[checkpoint.Piece, Mapping[str, np.ndarray]]],
  tokens_BxT: np.ndarray,
  plan: Plan,
) -> Iterator[tuple[checkpoint.Piece, dict[str, np.ndarray], list[carving.Division]]]:
  """Carves the pieces of a dense model, and yields them with the divisions of their layers.

  Args:
    dense: the config of the dense model.
    carved: what `carved_config` returns for it.
    pieces: all pieces in order, with arrays as in `checkpoint.piece_shapes` of `dense`.
    tokens_BxT: int32 calibration sequences.
    plan: the division of each layer.
  """
  positions = jnp.arange(tokens_BxT.shape[1])[None]
  rotation = attention.rotation(dense, positions)
  x = jnp.zeros(())
  for piece, arrays in pieces:
    if not piece.num_layers:
      top = params_lib.abstract(dense).replace(embedding=jnp.asarray(arrays["embedding"]))
      x = transformer.embed(top, dense, jnp.asarray(tokens_BxT))
      yield piece, dict(arrays), []
      continue
    layers = _layer_params(dense, arrays)
    result = dict(arrays)
    for name, spec in checkpoint.piece_shapes(carved, piece).items():
      if name not in arrays or arrays[name].shape != spec.shape:
        result[name] = np.empty(spec.shape, spec.dtype)
    divisions = []
    for i in range(piece.num_layers):
      location = kv_cache.layer_location(
        dense, piece.start + i, (piece.start + i, piece.start + i + 1)
      )
      x, normed, contributions = calibrate(
        dense, location.is_sliding, layers, i, x, positions, rotation
      )
      division = _carve_layer(
        carved, arrays, result, i, np.asarray(normed), np.asarray(contributions), plan
      )
      router, bias = (
        jnp.asarray(result[name][i : i + 1]) if name in result else None
        for name in ("router", "router_bias")
      )
      scores = ROUTER_KINDS[carved.router].logits(router, bias, 0, normed)
      x = add_active(
        carved, plan.active, x, contributions, layers.experts.down[i, 0], division.owners, scores
      )
      divisions.append(division)
    yield piece, result, divisions


def _layer_params(config: ModelConfig, arrays: Mapping[str, Any]) -> LayerParams:
  """Returns the parameters of a piece's layers from its arrays."""
  like = params_lib.abstract(config).layers
  leaves = [jnp.asarray(arrays[name]) for name in named_leaves(like)]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def calibrate(config, is_sliding, layers, layer, x, positions, rotation):
  """Runs a dense layer up to the activations of its neurons.

  Args:
    config: the dense model's config.
    is_sliding: whether the layer has the sliding window.
    layers: its parameters, and perhaps those of others.
    layer: its index in them.
    x: hidden states `[B, T, D]` before the layer.
    positions: int32 `[1, T]`.
    rotation: `attention.rotation` of the positions.

  Returns:
    Hidden states after attention, the feed-forward network's input `[B T, D]`, and contributions
    `[B T, F]`, both float32.
  """

  def attend(x):  # one sequence at a time, whose scores fit
    x = x[None]
    normed = transformer.norm(config, x, layers.attention_norm[layer])
    new = attention.project(config, layers.attention, layer, normed, *rotation)
    location = kv_cache.LayerLocation(is_sliding, layer)
    heads, _ = attention.attend_in_layer(
      config, layers.attention, layer, new, TokenBatch(positions), CacheAccess(), location
    )
    output = attention.output(layers.attention, layer, heads)
    return transformer.add_to_residual(config, x, output)[0]

  x = jax.lax.map(attend, x)
  normed = transformer.norm(config, x, layers.moe_norm[layer]).reshape(-1, x.shape[-1])
  gate_up = layers.experts.gate_up
  projected = project(normed, gate_up.reshape(len(gate_up), *gate_up.shape[2:]), layer)
  hidden = jax.nn.silu(projected[..., 0]) * projected[..., 1]
  norms = jnp.linalg.norm(layers.experts.down[layer, 0].astype(jnp.float32), axis=-1)
  return x, normed.astype(jnp.float32), hidden * norms[None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def add_active(config, active, x, contributions, down, owners, scores):
  """Adds the output of a carved layer's feed-forward network, from its neurons' contributions.

  Args:
    config: the model's config.
    active: A, the number of routed experts per token.
    x: hidden states `[B, T, D]` before the network.
    contributions: `[B T, F]`; see `calibrate`.
    down: `[F, D]`.
    owners: int `[F]`; see `carving.Division`.
    scores: `[B T, E]`, which order the routed experts.
  """
  down = down.astype(jnp.float32)
  norms = jnp.linalg.norm(down, axis=-1, keepdims=True)
  chosen = jnp.ones((len(scores), scores.shape[1] + 1), bool)  # the shared expert comes last
  chosen = chosen.at[:, :-1].set(False)
  _, experts = jax.lax.top_k(scores, active)
  chosen = chosen.at[jnp.arange(len(scores))[:, None], experts].set(True)
  output = jnp.where(chosen[:, owners], contributions, 0) @ (down / jnp.where(norms > 0, norms, 1))
  return transformer.add_to_residual(config, x, output.reshape(x.shape).astype(x.dtype))


def _carve_layer(carved, arrays, result, layer, normed, contributions, plan) -> carving.Division:
  """Fills layer `layer` of the carved arrays `result` and returns the division."""
  division = carving.divide(contributions, plan)
  gate_up, down = arrays["experts.gate_up"][layer, 0], arrays["experts.down"][layer, 0]
  result["experts.gate_up"][layer] = gate_up[division.experts]
  result["experts.down"][layer] = down[division.experts]
  if plan.shared:
    result["shared_expert.gate_up"][layer] = gate_up[division.shared]
    result["shared_expert.down"][layer] = down[division.shared]
  if carved.router == NEURONS:
    result["router"][layer] = gate_up[division.representatives]
  else:
    targets = carving.expert_contributions(contributions, division.experts)
    result["router"][layer], result["router_bias"][layer] = carving.fit_linear(normed, targets)
  return division


def dense_pieces(
  source: str | pathlib.Path, carved: ModelConfig, names: Iterable[str]
) -> Iterator[tuple[checkpoint.Piece, dict[str, np.ndarray]]]:
  """Yields pieces of a carved checkpoint as those of the dense model, bit for bit.

  Raises:
    ConversionError: the checkpoint has no valid carving.json.
  """
  try:
    file = pathlib.Path(source) / CARVING_FILE
    neurons = np.array(typed.read(file, {"neurons": list[list[int]]})["neurons"])
    width = dense_config(carved).d_expert
    if not np.array_equal(np.sort(neurons), np.tile(np.arange(width), (carved.num_layers, 1))):
      raise ValueError("its neurons are not those of the model")
  except (OSError, ValueError) as error:
    raise ConversionError(
      f"{source} has experts that were carved out of a dense model, but its {CARVING_FILE} cannot "
      f"be used: {error}"
    ) from error
  for piece, arrays in checkpoint.iterate_pieces(source, list(names)):
    for name in ("router", "router_bias"):
      arrays.pop(name, None)
    for name in ("gate_up", "down") if piece.num_layers else ():
      part = arrays.pop(f"experts.{name}")
      part = part.reshape(len(part), -1, *part.shape[3:])
      if carved.d_shared_expert:
        part = np.concatenate([arrays.pop(f"shared_expert.{name}"), part], axis=1)
      whole = arrays[f"experts.{name}"] = np.empty_like(part)[:, None]
      for layer, order in enumerate(neurons[piece.start : piece.stop]):
        whole[layer, 0, order] = part[layer]
    yield piece, arrays
