"""Measures how evenly a roster spreads its work over the devices of an expert-parallel mesh.

  python -m experiments.expert_load --checkpoint=embedded:wordmath_control --taus=0,0.25,0.5,1

A device computes the chosen experts that it holds: its load is the number of (token, member,
choice) triples of its experts. A step waits for the device with the largest load, so the table has
the largest load over the mean, 1 at best, as means over layers:

* `step`: of one decode step of --batch_size sequences, the mean over steps;
* `total`: of all tokens of a batch together, which is what stays when steps are many or large.

`step, even` draws as many choices per step from all experts alike: the part of `step` that is
chance. Devices hold neighboring experts, as in `sharding`; for `total, placed`, the expert with the
next largest load in the other batches goes to the device with the least so far. Intervals (95 %,
bootstrap over batches) are of the difference from the baseline. Writes --output.
"""

import pathlib

from absl import flags
import numpy as np

from checkpoints_convert import outputs
from experiments import tasks
from experiments.analysis import paired_statistics
from experiments.cli import app, text_files
from experiments.cli.extras import tabulate
from experiments.evaluation.requests import TaskRequests
from roe_jax import diagnostics
from roe_jax.roster import Roster

FLAGS = flags.FLAGS


def define_flags() -> None:
  app.define_model_flags()
  app.define_chat_flags()
  app.define_limit_flag()
  flags.DEFINE_list("taus", ["0", "0.25", "0.5", "1"], "Router temperatures τ of all layers.")
  flags.DEFINE_integer("num_members", 8, "Roster size n.", lower_bound=1)
  flags.DEFINE_integer("num_devices", 4, "Devices along the mesh axis expert.", lower_bound=2)
  flags.DEFINE_string("task", "wordmath", "Task whose references are run.")
  flags.DEFINE_string("data_dir", "data", "Folder of the tasks' data.")
  flags.DEFINE_integer("num_batches", 12, "Batches of sequences.", lower_bound=3)
  flags.DEFINE_integer("batch_size", 32, "Sequences decoded together.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed for routing noise.")
  flags.DEFINE_string("output", "results/expert_load.json", "The results.")


def loads(experts: np.ndarray, lengths: list[int], num_experts: int) -> np.ndarray:
  """Counts how often the experts are chosen.

  Args:
    experts: `[L, R, B, S, A]`, chosen experts as `diagnostics.trace` returns them.
    lengths: of the B sequences; later positions do not count.
    num_experts: E; an expert E is none.

  Returns:
    `[L, S, E]`, the (sequence, member, choice) triples of each position.
  """
  l, _, _, s, _ = experts.shape
  seen = np.arange(s) < np.array(lengths)[:, None]
  experts = np.where(seen[None, None, ..., None], experts, num_experts)
  experts = experts.transpose(0, 3, 1, 2, 4).reshape(l * s, -1)
  counts = np.zeros((l * s, num_experts + 1), np.int64)
  np.add.at(counts, (np.arange(l * s)[:, None], experts), 1)
  return counts[:, :num_experts].reshape(l, s, num_experts)


def placed(load: np.ndarray, num_devices: int) -> np.ndarray:
  """Places experts on devices by their loads: the largest first, to the least loaded device.

  Args:
    load: `[E]`.
    num_devices: a divisor of E; each holds as many experts.

  Returns:
    `[E]`, the device of each expert.
  """
  device, total = np.zeros(len(load), int), np.zeros(num_devices)
  room = np.full(num_devices, len(load) // num_devices)
  for expert in np.argsort(-load, kind="stable"):
    best = np.argmin(np.where(room > 0, total, np.inf))
    device[expert] = best
    total[best] += load[expert]
    room[best] -= 1
  return device


def imbalance(load: np.ndarray, devices: np.ndarray) -> np.ndarray:
  """Returns the largest load of a device over the mean, `[..., S]`.

  Args:
    load: `[..., S, E]`; positions without any load are NaN.
    devices: `[..., E]`, the device of each expert, without the axis S.
  """
  member = devices[..., None] == np.arange(devices.max() + 1)
  of_device = np.einsum("...se,...ed->...sd", load, member)
  mean = of_device.mean(-1)
  return of_device.max(-1) / np.where(mean > 0, mean, np.nan)


def measures(batches: list[np.ndarray], num_devices: int) -> dict[str, np.ndarray]:
  """Returns the measures of the table, one value per batch; `batches` are results of `loads`."""
  totals = np.stack([b.sum(1) for b in batches])  # [N, L, E]
  experts = np.arange(totals.shape[-1])
  contiguous = np.broadcast_to(experts * num_devices // len(experts), totals.shape[1:])
  random = np.random.RandomState(0)
  found = {name: [] for name in ("step", "step, even", "total", "total, placed")}
  for i, batch in enumerate(batches):
    others = np.delete(totals, i, axis=0).sum(0)
    by_load = np.stack([placed(load, num_devices) for load in others])
    draws = batch.sum(-1)
    uniform = np.full(len(experts), 1 / len(experts))
    even = np.stack([random.multinomial(count, uniform) for count in draws.ravel()])
    even = even.reshape(batch.shape)
    found["step"].append(np.nanmean(imbalance(batch, contiguous)))
    found["step, even"].append(np.nanmean(imbalance(even, contiguous)))
    found["total"].append(imbalance(totals[i, :, None], contiguous).mean())
    found["total, placed"].append(imbalance(totals[i, :, None], by_load).mean())
  return {name: np.array(values) for name, values in found.items()}


def main(argv) -> None:
  del argv
  config = app.load_config(FLAGS.checkpoint)
  if config.num_experts % FLAGS.num_devices:
    raise ValueError(
      f"--num_devices={FLAGS.num_devices} must divide the number of experts ({config.num_experts})"
    )
  builder = app.request_builder(config, app.load_tokenizer(FLAGS.checkpoint))
  task = tasks.get(FLAGS.task)
  size = FLAGS.batch_size
  examples = task.examples("test", FLAGS.data_dir, size * FLAGS.num_batches, FLAGS.chat)
  requests = TaskRequests.of(builder, task, examples, num_samples=0).all_references
  sequences = [r.sequence for r in requests[: size * FLAGS.num_batches]]
  if len(sequences) < size * FLAGS.num_batches:
    raise ValueError(f"there are {len(sequences)} sequences for {FLAGS.num_batches} batches")
  params, config = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)

  def of(roster):
    batches = []
    for start in range(0, len(sequences), size):
      part, ids = sequences[start : start + size], range(start, start + size)
      chosen = diagnostics.trace(params, config, part, roster=roster, request_ids=ids).experts
      batches.append(loads(chosen, list(map(len, part)), config.num_experts))
    return measures(batches, FLAGS.num_devices)

  baseline = of(Roster.create(config))
  rows, results = [], {"baseline": {k: v.tolist() for k, v in baseline.items()}}
  rows.append(["baseline", *(f"{v.mean():.3f}" for v in baseline.values())])
  for tau in FLAGS.taus:
    found = of(Roster.create(config, FLAGS.num_members, float(tau), seed=FLAGS.seed))
    results[tau] = {name: values.tolist() for name, values in found.items()}
    cells = []
    for name, values in found.items():
      change = paired_statistics.bootstrap([values - baseline[name]], np.mean)
      cells.append("{:.3f} ({:+.3f} [{:+.3f}, {:+.3f}])".format(values.mean(), *change))
    rows.append([f"n = {FLAGS.num_members}, τ = {tau}", *cells])
  app.write_atomically(pathlib.Path(FLAGS.output), text_files.to_json(results, indent=2) + "\n")
  print(tabulate.tabulate(rows, ["largest load / mean", *baseline]))


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  reason = "it traces one model in one process"
  app.run(main, not_distributed=reason, needs=("scipy", "tabulate"), output=outputs.FILE)


if __name__ == "__main__":
  program()
