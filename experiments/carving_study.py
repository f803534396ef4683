"""Compares ways to carve experts out of a dense model, and rosters on carved checkpoints.

  python -m experiments.carving_study --source=smollm2 --calibration=other.txt --text=wiki.txt
  python -m experiments.carving_study --checkpoints=carved --text=wiki.txt

With --source, prints the perplexity of a text for each of --variants, PLAN:SPLIT:ROUTER. Splits are
active (`carving.divide`), cmoe (the neurons that are most often among the 10 largest activations),
and random. Routers are linear and neurons as in checkpoints_convert --carve_router, and oracle,
which knows the norm of each expert's contributions. An A of 0 is the shared expert alone.

With --checkpoints, prints the perplexity of carved checkpoints at each number of --active experts,
and with rosters of --seeds seeds, and the output temperature that is best for the same text.
Differences from the baseline are paired by window, with 95 % bootstrap intervals over windows.

Windows do not overlap. With --output, both resume when rerun with the same flags.
"""

from collections.abc import Callable
import functools
import itertools
import pathlib

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import carve_checkpoint, carving
from experiments.analysis import output_temperatures, paired_statistics
from experiments.cli import app, overrides, text_files
from experiments.cli.extras import tabulate
from experiments.records import store
from roe_jax import attention, scoring, transformer
from roe_jax import cache as kv_cache
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.routers import NONE
from roe_jax.routing import with_experts
from roe_jax.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS
TEMPERATURES = np.geomspace(0.5, 2.0, 25)  # output temperatures; 1 is among them
SPLITS = ("active", "cmoe", "random")
ROUTERS = ("linear", "neurons", "oracle")
_VARIANTS = (
  "S4A8E16:random:linear",
  "S12A0E16:active:linear",
  "S4A8E16:cmoe:neurons",
  "S4A8E16:active:neurons",
  "S4A8E16:active:linear",
  "S4A8E16:active:oracle",
)


def define_flags() -> None:
  flags.DEFINE_string("source", None, "Dense model: a checkpoint, a folder or a hub name.")
  flags.DEFINE_list("variants", list(_VARIANTS), "What to compare on --source.")
  flags.DEFINE_string("calibration", None, "Text file to calibrate on, with --source.")
  flags.DEFINE_integer("calibration_tokens", 4096, "Number of tokens of --calibration to use.")
  flags.DEFINE_list("checkpoints", [], "Carved checkpoints to run rosters on.")
  flags.DEFINE_list("active", [], "Numbers of active experts besides the model's. Default: all.")
  flags.DEFINE_list("members", ["2", "8"], "Roster sizes n.")
  flags.DEFINE_list("sweep", ["0.1", "0.3", "1.0"], "Router temperatures τ.")
  flags.DEFINE_string("text", None, "Text file to compute perplexities of.", required=True)
  flags.DEFINE_integer("num_tokens", 4096, "Number of tokens of --text to use.")
  flags.DEFINE_integer("window", 512, "Tokens per window.")
  flags.DEFINE_integer("seed", 0, "First seed for routing noise, and seed for random splits.")
  flags.DEFINE_integer("seeds", 3, "Number of seeds for routing noise.", lower_bound=1)
  flags.DEFINE_string("output", None, "Folder for the results. Default: none are saved.")


def windows(tokenizer: Tokenizer, path: str, count: int) -> np.ndarray:
  """Returns the first tokens of a text file as whole windows `[B, T]`.

  Raises:
    ValueError: the text has fewer tokens, or not even one window is asked for.
  """
  tokens = tokenizer.encode(text_files.read(path), add_special_tokens=False)
  if not FLAGS.window <= count <= len(tokens):
    raise ValueError(
      f"{path} has {len(tokens)} tokens: give a number of tokens of at least one window "
      f"({FLAGS.window}) and at most that, got {count}"
    )
  return np.asarray(tokens[: count // FLAGS.window * FLAGS.window]).reshape(-1, FLAGS.window)


def _random_split(contributions, plan, seed):
  neurons = np.random.default_rng(seed).permutation(contributions.shape[1])
  shared, rest = np.split(neurons, [plan.shared * plan.width(len(neurons))])
  experts = rest.reshape(plan.routed, -1)
  return carving.Division(shared, experts, experts[:, 0])


def _cmoe_split(contributions, norms, plan):
  return carving.divide(contributions / norms, plan, marked=10, by_rate=True)


def perplexity_of_variant(
  params: Params,
  config: ModelConfig,
  calibration: np.ndarray,
  text: np.ndarray,
  plan: carving.Plan,
  split: str,
  router: str,
) -> float:
  """Returns the perplexity of a text under a carved model, which is not written."""
  tokens = jnp.asarray(np.concatenate([calibration, text]))
  positions = jnp.arange(tokens.shape[1])[None]
  rotation = attention.rotation(config, positions)
  x = transformer.embed(params, config, tokens)
  known = slice(calibration.size)
  for layer in range(config.num_layers):
    location = kv_cache.layer_location(config, layer, (layer, layer + 1))
    x, normed, contributions = carve_checkpoint.calibrate(
      config, location.is_sliding, params.layers, layer, x, positions, rotation
    )
    normed, contributions = np.asarray(normed), np.asarray(contributions)
    down = np.asarray(params.layers.experts.down[layer, 0], np.float32)
    norms = np.linalg.norm(down, axis=1)
    division = {
      "active": lambda c: carving.divide(c, plan),
      "cmoe": lambda c: _cmoe_split(c, norms, plan),
      "random": lambda c: _random_split(c, plan, FLAGS.seed + layer),
    }[split](contributions[known])
    logs = carving.expert_contributions(contributions, division.experts)

    def linear():
      weights, bias = carving.fit_linear(normed[known], logs[known])
      return normed @ weights.T + bias

    scores = {
      "linear": linear,
      "neurons": lambda: np.abs(contributions / norms)[:, division.representatives],
      "oracle": lambda: logs,
    }[router]()
    x = carve_checkpoint.add_active(
      config, plan.active, x, contributions, down, division.owners, scores
    )
  nll = [
    _nll(params, config, states, jnp.asarray(tokens))
    for states, tokens in zip(x[len(calibration) :], text)
  ]
  return float(np.exp(np.mean(nll)))


@functools.partial(jax.jit, static_argnums=1)
def _nll(params, config, x, tokens):
  log_probs = jax.nn.log_softmax(transformer.unembed(params, config, x[None])[0, :-1])
  return -jnp.take_along_axis(log_probs, tokens[1:, None], axis=1).mean()


def roster_rows(
  params: Params,
  config: ModelConfig,
  text: np.ndarray,
  keep: Callable[[str, Callable], list[list[float]]],
) -> list[list]:
  """Returns a table's rows for one carved checkpoint, with its baseline first."""
  active = [int(a) for a in FLAGS.active] or [config.num_experts]
  own = config.experts_per_token
  settings = [(a, 1, 0.0) for a in dict.fromkeys([own, *active])]
  settings += [(own, int(n), float(t)) for t in FLAGS.sweep for n in FLAGS.members]
  tokens = np.full(len(text), text.shape[1] - 1)
  rows, baseline = [], None
  for count, n, tau in settings:
    model = with_experts(config, count)

    def nll(seed):
      roster = Roster.create(model, n, tau, seed=seed)
      scores = scoring.score(
        params,
        model,
        text.tolist(),
        roster=roster,
        output_temperatures=TEMPERATURES.tolist(),
        batch_size=4,
      )
      return [(-s.log_probs.sum(axis=0, dtype=np.float64)).tolist() for s in scores.sequences]

    seeds = range(FLAGS.seed, FLAGS.seed + (FLAGS.seeds if n > 1 else 1))
    name = f"{count} active, n = {n}, τ = {tau}, seed = "
    nll_XxSxG = np.stack([keep(f"{name}{seed}", lambda: nll(seed)) for seed in seeds], axis=1)
    total_G = nll_XxSxG.sum(axis=(0, 1))
    plain, fitted = (nll_XxSxG[..., i] for i in (len(TEMPERATURES) // 2, np.argmin(total_G)))
    share = (config.d_shared_expert + count * config.d_expert) / (
      config.d_shared_expert + config.num_experts * config.d_expert
    )
    row = [f"{count} of {config.num_experts}", f"{100 * n * share:.0f} %", n, tau if n > 1 else ""]
    row.append(f"{paired_statistics.perplexity(plain, tokens).value:.2f}")
    row.append(_difference(plain, baseline and baseline[0], tokens))
    row.append(f"{paired_statistics.perplexity(fitted, tokens).value:.2f}")
    row.append(f"{output_temperatures.fit(total_G[None], TEMPERATURES):.2f}")
    row.append(_difference(fitted, baseline and baseline[1], tokens))
    rows.append(row)
    print(*row, sep=" | ", flush=True)
    baseline = baseline or (plain, fitted)
  return rows


def _difference(nll_XxS, baseline_XxS, tokens_X) -> str:
  if baseline_XxS is None:
    return ""
  found = paired_statistics.paired_perplexity(nll_XxS, baseline_XxS, tokens_X)
  return f"{found.value:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"


def main(argv) -> None:
  del argv
  if bool(FLAGS.source) == bool(FLAGS.checkpoints):
    raise ValueError("give either --source or --checkpoints")
  if bool(FLAGS.source) != bool(FLAGS.calibration):
    raise ValueError("--source and --calibration belong together: give both or neither")
  output = FLAGS.output and pathlib.Path(FLAGS.output)
  names = ("num_tokens", "window", "seed", "calibration", "calibration_tokens", "text")
  saved = store.SavedValues(
    output / "measured.jsonl" if output else None,
    {n: FLAGS[n].value for n in names} | {"temperatures": TEMPERATURES.tolist()},
  )
  variants = [v.split(":") for v in FLAGS.variants]
  for variant in variants:
    if len(variant) != 3 or variant[1] not in SPLITS or variant[2] not in ROUTERS:
      raise ValueError(
        f"--variants are PLAN:SPLIT:ROUTER with a split of {', '.join(SPLITS)} and a router of "
        f"{', '.join(ROUTERS)}, got {':'.join(variant)}"
      )
  for name in FLAGS.checkpoints:  # check everything before any work
    config = app.load_config(name)
    members, sweep = overrides.items("members", int), overrides.items("sweep", float)
    for n, tau in itertools.product(members, sweep):
      Roster.create(config, n, tau, seed=FLAGS.seed)
    for count in overrides.items("active", int):
      with_experts(config, count)
  texts = []
  if FLAGS.source:
    if app.load_config(FLAGS.source).router != NONE:
      raise ValueError(f"{FLAGS.source} has experts already: give a dense model")
    params, config, tokenizer = app.open_model(FLAGS.source, "float32")
    text = windows(tokenizer, FLAGS.text, FLAGS.num_tokens)
    calibration = windows(tokenizer, FLAGS.calibration, FLAGS.calibration_tokens)
    rows = []
    for plan, split, router in variants:
      perplexity = saved.get(
        f"{FLAGS.source}, {plan}:{split}:{router}",
        lambda: perplexity_of_variant(
          params, config, calibration, text, carving.Plan.parse(plan), split, router
        ),
      )
      share = carving.Plan.parse(plan)
      share = f"{100 * (share.shared + share.active) / share.experts:.1f} %"
      rows.append([share, plan, split, router, f"{perplexity:.2f}"])
      print(*rows[-1], sep=" | ", flush=True)
    headers = ["neurons active", "carving", "split", "router", "perplexity"]
    texts.append(tabulate.tabulate(rows, headers, "github"))
  for name in FLAGS.checkpoints:
    params, config, tokenizer = app.open_model(name, None)
    text = windows(tokenizer, FLAGS.text, FLAGS.num_tokens)
    keep = lambda part, compute: saved.get(f"{name}, {part}", compute)
    against = "difference"
    headers = ["active experts", "active × n", "n", "τ", "perplexity", against]
    headers += ["at its best T", "best T", against]
    rows = roster_rows(params, config, text, keep)
    texts.append(f"{name}\n\n" + tabulate.tabulate(rows, headers, "github"))
  table = "\n\n".join(texts) + "\n"
  print("\n" + table)
  if output:
    app.write_atomically(output / "table.md", table)


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(
    main,
    not_distributed="it carves and scores on one device: carve with checkpoints_convert, and run "
    "experiments.score on the result",
    needs=("scipy", "tabulate"),
  )


if __name__ == "__main__":
  program()
