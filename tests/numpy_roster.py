"""A roster in numpy and float64: one member, one position, one layer at a time.

Written from the method's definition (arXiv 2509.17238) and the models' order of
operations, with none of the library's functions, for float32 models.
"""

import functools

import jax
import numpy as np

from roe_jax import quantization


def member_logits(
  params, config, roster, tokens, request, record=lambda layer, position, experts: None
):
  """Logits `[R, T, V]` of `roster.members` at all positions of one text.

  `record` is told each member's experts, member by member.
  """
  whole = lambda tree: jax.tree.map(lambda w: np.asarray(w, np.float64), tree)
  tasks, of_noisy_tasks = params.tasks, roster.member_tasks
  p = whole(params.replace(tasks=None))

  @functools.cache
  def matrix(name, index, bits=None):
    """An experts' matrix as this member reads it, or with these bits."""
    w = getattr(params.layers.experts, name)
    if not quantization.is_quantized(w):
      return getattr(p.layers.experts, name)
    w, of_noisy = jax.tree.map(np.asarray, w), roster.member_bits
    if bits is not None:
      w = quantization.first_planes(w, bits)
    elif of_noisy and index:
      w = quantization.first_planes(w, of_noisy[0 if len(of_noisy) == 1 else index - 1])
    return quantization.dequantize_on_host(w).astype(np.float64)

  layers = range(config.num_layers)
  scale = config.attention_multiplier or config.head_dim**-0.5
  if config.rope_scaling is not None and getattr(config.rope_scaling, "mscale_all_dim", 0):
    scaling = config.rope_scaling
    scale *= (1 + scaling.mscale_all_dim * np.log(scaling.factor) / 10) ** 2
  residual = config.residual_multiplier
  temperatures = np.asarray(roster.temperatures, np.float64)
  draws = _draws(
    roster.seed,
    np.uint32(request),
    np.array(roster.members),
    np.arange(config.num_layers),
    np.arange(-(-len(tokens) // 16) * 16),  # few shapes, as each is compiled
    roster.temperatures,
    roster.noise,
    config.num_experts,
    config.experts_per_token,
    config.router_state,
  )
  draws = jax.tree.map(lambda a: np.asarray(a, np.float64), draws)

  def norm(x, weight, epsilon=config.rms_norm_eps):
    return x / np.sqrt(np.mean(x * x) + epsilon) * weight

  def rope(x, position):
    half = (config.rotary_dim or config.head_dim) // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_scaling is None:
      magnitude = 1.0
    else:
      frequencies, magnitude = yarn(config, frequencies), config.rope_scaling.attention_factor
    pairs = x[:, :half] + 1j * x[:, half : 2 * half]
    turned = pairs * magnitude * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag, x[:, 2 * half :]], axis=-1)

  def gates(clean, noisy, chosen, layer):
    """The weights of the chosen experts by the setting's rule."""
    source = noisy if roster.gate_weights == "noisy" else clean
    if config.router == "sigmoid":
      probabilities = 1 / (1 + np.exp(-source))
    else:
      probabilities = np.exp(source - source.max())
      probabilities /= probabilities.sum()
    weights = probabilities[chosen]
    if config.unit_gates:
      scales = p.layers.gate_scales[layer, chosen] if config.gate_scales else 0
      weights = 1 + scales * weights
    weights = np.where(np.isneginf(noisy[chosen]), 0, weights)
    weights = config.gate_multiplier * weights
    if config.normalize_gates:
      return config.gate_multiplier * weights / weights.sum()
    if config.gate_mass_experts:
      return weights * weights[: config.gate_mass_experts].sum() / weights.sum()
    if roster.gate_weights == "clean_rescaled":
      mass = config.gate_multiplier * probabilities[best(clean, layer)].sum()
      return weights * mass / weights.sum()
    return weights

  def best(logits, layer):
    """The experts that are chosen by these logits, best first."""
    scores = logits
    if config.router == "sigmoid":
      scores = 1 / (1 + np.exp(-logits)) + p.layers.correction_bias[layer]
      size = config.num_experts // config.expert_groups
      groups = np.split(np.arange(config.num_experts), config.expert_groups)
      totals = [np.sort(scores[group])[-2:].sum() for group in groups]
      for i in np.argsort(totals)[: config.expert_groups - config.groups_per_token]:
        scores[i * size : (i + 1) * size] = -np.inf
    return np.argsort(-scores)[: config.experts_per_token]

  def perturbed(clean, index, layer, position):
    """The logits by which a member chooses."""
    temperature = temperatures[layer]
    if index is None or roster.members[index] == 0 or not temperature:
      return clean
    order = np.argsort(-clean)
    if roster.noise == "second_expert":
      return np.where(np.arange(len(clean)) == order[1], clean, -np.inf)
    if roster.noise.startswith("on_state"):
      return (
        clean + temperature * ("logits=true" in roster.noise) * draws[0][index, layer, position]
      )
    if roster.noise != "swap":
      return clean + temperature * draws[index, layer, position]
    coins, shuffled = (d[index, layer, position] for d in draws)
    chosen, others = np.split(order, [config.experts_per_token])
    others = others[shuffled.astype(int)].tolist()
    noisy = clean.copy()
    for expert in chosen[coins > 0]:
      if others:
        other = others.pop(0)
        noisy[[expert, other]] = clean[[other, expert]]
    return noisy

  def count(index, layer):
    """How many experts a member uses."""
    if roster.experts_by_layer is None:
      return config.experts_per_token
    rows = np.asarray(roster.experts_by_layer)
    return rows[0 if index is None or len(rows) == 1 else roster.members[index]][layer]

  def every_token(mlp, row, x):
    gate, up = np.einsum("d,fid->if", x, mlp.gate_up[row])
    return (gate / (1 + np.exp(-gate)) * up) @ mlp.down[row]

  def recurrent_router(row, normed, state, index, layer, position):
    """The next state of a recurrent router."""
    cell, sigmoid = p.router_cell, lambda v: 1 / (1 + np.exp(-v))
    u = p.layers.router_projection[row] @ normed
    of_input, of_state = cell.input @ u + cell.input_bias, cell.state @ state + cell.state_bias
    r, z = sigmoid(of_input[:2] + of_state[:2])
    state = (1 - z) * np.tanh(of_input[2] + r * of_state[2]) + z * state
    if index and roster.members[index] and roster.noise.startswith("on_state"):
      scale = float(roster.noise.partition("scale=")[2].partition(",")[0])
      state = state + scale * temperatures[layer] * draws[1][index, layer, position]
    return state

  def latent(a, row, normed, position):
    """Queries, keys and values of all heads, computed from latents (arXiv 2405.04434)."""
    turned, z = config.rotary_dim, config.kv_lora_rank

    def rotated(heads):
      if config.rotary_interleaved:
        heads = np.concatenate([heads[:, ::2], heads[:, 1::2]], axis=1)
      return rope(heads, position)

    of_query = normed
    if config.q_lora_rank:
      of_query = norm(a.query_down[row] @ normed, a.query_norm[row], 1e-6)
    query = np.einsum("q,hcq->hc", of_query, a.query[row])
    down = a.key_down[row] @ normed
    c = norm(down[:z], a.key_norm[row], 1e-6)
    shared = np.repeat(rotated(down[None, z:]), config.num_heads, axis=0)
    query = np.concatenate([query[:, :-turned], rotated(query[:, -turned:])], axis=1)
    key = np.concatenate([np.einsum("z,hnz->hn", c, a.key_up[row]), shared], axis=1)
    return query, key, np.einsum("z,hxz->hx", c, a.value_up[row])

  def standard(a, row, normed, position):
    """Queries, keys and values of all heads."""
    query, key, value = (
      np.einsum("d,hcd->hc", normed, w[row]) + (b[row] if config.qkv_bias else 0)
      for w, b in ((a.query, a.query_bias), (a.key, a.key_bias), (a.value, a.value_bias))
    )
    if config.qk_norm_per_head:
      query, key = (
        np.stack([norm(head, weight[row]) for head in heads])
        for heads, weight in ((query, a.query_norm), (key, a.key_norm))
      )
    elif config.qk_norm:
      query, key = norm(query, a.query_norm[row]), norm(key, a.key_norm[row])
    if config.clip_qkv is not None:
      query, key, value = (
        np.clip(v, -config.clip_qkv, config.clip_qkv) for v in (query, key, value)
      )
    return rope(query, position), rope(key, position), value

  def add(x, y, weights, row):
    return x + residual * (norm(y, weights[row]) if config.sandwich_norm else y)

  def block(x, state, layer, position, index, history):
    first = config.first_dense_layers
    stack, row = (p.dense_layers, layer) if layer < first else (p.layers, layer - first)
    a = stack.attention
    normed = norm(x, stack.attention_norm[row])
    attend = latent if config.kv_lora_rank else standard
    query, key, value = attend(a, row, normed, position)
    seen = history + [(key, value)]
    if layer in config.sliding_layers:
      seen = seen[-config.sliding_window :]
    heads = []
    for head in range(config.num_heads):
      group = head // (config.num_heads // len(key))
      scores = np.array([query[head] @ k[group] for k, _ in seen]) * scale
      weights = np.exp(scores)
      total = weights.sum() + (np.exp(a.sinks[row, head]) if config.attention_sinks else 0)
      heads.append(sum(w * v[group] for w, (_, v) in zip(weights / total, seen)))
    y = np.einsum("hc,hcd->d", np.array(heads), a.output[row])
    if config.output_bias:
      y = y + a.output_bias[row]
    x = add(x, y, stack.attention_output_norm, row)

    normed = norm(x, stack.moe_norm[row])
    if layer < first:
      y = every_token(stack.shared_expert, row, normed)
      return add(x, y, stack.moe_output_norm, row), state, (key, value)
    if config.router_state:
      state = recurrent_router(row, normed, state, index, layer, position)
    clean = p.layers.router[row] @ (state if config.router_state else normed)
    if config.router_bias:
      clean = clean + p.layers.router_bias[row]
    noisy = perturbed(clean, index, layer, position)
    chosen = best(noisy, row)[: count(index, layer)]
    if index is not None:
      record(layer, position, chosen)
    total = np.zeros_like(x)
    for expert, weight in zip(chosen, gates(clean, noisy, chosen, row)):
      experts, bits = p.layers.experts, None
      if config.bit_router and not (index and roster.member_bits):
        base = int(config.expert_format.removeprefix("nested:").split("-")[0])
        bits = base + int(np.argmax(p.layers.bit_router[row, expert] @ normed))
      gate, up = np.einsum("d,fid->if", normed, matrix("gate_up", index, bits)[row, expert])
      if config.expert_bias:
        gate, up = (
          gate + experts.gate_up_bias[row, expert, :, 0],
          (up + experts.gate_up_bias[row, expert, :, 1]),
        )
      if config.swiglu_limit is None:
        hidden = gate / (1 + np.exp(-gate)) * up
      else:
        gate = np.minimum(gate, config.swiglu_limit)
        up = np.maximum(np.minimum(up, config.swiglu_limit), -config.swiglu_limit)
        hidden = gate / (1 + np.exp(-config.swiglu_alpha * gate)) * (up + 1)
      y = hidden @ matrix("down", index, bits)[row, expert]
      total += weight * (y + experts.down_bias[row, expert] if config.expert_bias else y)
    if config.d_shared_expert:
      shared = p.layers.shared_expert
      y = every_token(shared, row, normed)
      if config.shared_expert_gate:
        y = y / (1 + np.exp(-(shared.gate[row, 0] @ normed)))
      total += y
    return add(x, total, stack.moe_output_norm, row), state, (key, value)

  def run(index, shared_history):
    """All positions of one member: logits, and its keys and values by layer."""
    nonlocal p
    p = of_base
    if of_noisy_tasks and index and roster.members[index]:
      number = roster.members[index] - 1
      p = of_task(of_noisy_tasks[0 if len(of_noisy_tasks) == 1 else number])
    own_history, logits = [[] for _ in layers], []
    for position, token in enumerate(tokens):
      x, state = config.embedding_multiplier * p.embedding[token], np.zeros(config.router_state)
      for layer in layers:
        history = (shared_history or own_history)[layer][:position]
        x, state, own = block(x, state, layer, position, index, history)
        own_history[layer].append(own)
      logits.append(p.unembedding @ norm(x, p.final_norm) / config.logits_scaling)
    return np.array(logits), own_history

  of_base = p

  def of_task(task):
    """A task's parameters: the base's, and the unified vector where its bits are set."""

    def change(path, w):
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      if name in tasks.own:
        return np.asarray(tasks.own[name][task], np.float64)
      bits = np.unpackbits(np.asarray(tasks.masks[name][task]))[: w.size].reshape(w.shape)
      return w + float(tasks.scales[task]) * bits * np.asarray(tasks.vector[name], np.float64)

    return jax.tree_util.tree_map_with_path(change, of_base)

  shared = run(None, None)[1] if roster.cache == "clean" else None
  return np.array([run(index, shared)[0] for index in range(len(roster.members))])


def yarn(config, frequencies):
  """YaRN's frequencies (arXiv 2309.00071): slow dimensions are interpolated."""
  s, half = config.rope_scaling, (config.rotary_dim or config.head_dim) // 2

  def dimension(rotations):
    """At which (fractional) dimension the original context is so many rotations."""
    return half * np.log(s.original_context / (2 * np.pi * rotations)) / np.log(config.rope_theta)

  low, high = dimension(s.beta_fast), dimension(s.beta_slow)
  if s.truncate:
    low, high = np.floor(low), np.ceil(high)
  low, high = max(low, 0), min(high, 2 * half - 1)
  ramp = np.clip((np.arange(half) - low) / (max(high - low, 0.001)), 0, 1)
  return frequencies * (1 - ramp) + frequencies / s.factor * ramp


@functools.partial(jax.jit, static_argnames=("family", "num_experts", "count", "width"))
def _draws(
  seed, request, members, layers, positions, temperatures, family, num_experts, count, width
):
  """What is drawn at all addresses, before the temperature: vectors `[R, L, T, E]`.

  Of "swap" a pair: which choices are replaced, `[R, L, T, A]`, and an order of the
  other experts, `[R, L, T, E - A]`. Of "on_state" a pair, too: of logits, and of states.
  """

  def draw(member, layer, position):
    key = jax.random.key(seed, impl="threefry2x32")
    for number in (0, request, position, layer, member):  # 0: the routing stream
      key = jax.random.fold_in(key, number)
    if family == "swap":
      coins, order = jax.random.split(key)
      return (
        jax.random.bernoulli(coins, temperatures[layer], (count,)),
        jax.random.permutation(order, num_experts - count),
      )
    if family.startswith("on_state"):
      of_state = jax.random.normal(jax.random.fold_in(key, 1), (width,))
      return jax.random.gumbel(key, (num_experts,)), of_state
    deviation = np.pi / np.sqrt(6)  # of a Gumbel variable
    return {
      "gumbel": lambda: jax.random.gumbel(key, (num_experts,)),
      "gaussian": lambda: deviation * jax.random.normal(key, (num_experts,)),
      "uniform": lambda: deviation * np.sqrt(12) * (jax.random.uniform(key, (num_experts,)) - 0.5),
      "second_expert": lambda: np.zeros(num_experts),
    }[family]()

  by_position = jax.vmap(draw, in_axes=(None, None, 0))
  by_layer = jax.vmap(by_position, in_axes=(None, 0, None))
  return jax.vmap(by_layer, in_axes=(0, None, None))(members, layers, positions)
