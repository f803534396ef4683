"""Training runs in a folder: settings, metrics, and states from which they resume.

* `config.json`: the settings.
* `metrics.jsonl`: a line every few steps and for every evaluation.
* `states/`: the last two training states. The same run resumes from them and ends with the
  parameters of an uninterrupted one.
"""

from collections.abc import Callable
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from checkpoints_convert import outputs
from experiments.benchmarks import machine
from experiments.cli import app, text_files
from experiments.records import store
from roe_jax import orbax_storage, typed
from roe_jax.training import TrainState

# In a folder that a run starts in, or that was killed at its start.
_OWN = ("config.json.partial", outputs.LOCK)


class Metrics(store.Store):
  """`metrics.jsonl`: one line per record, with each step once even if the run was interrupted."""

  def __init__(self, path: pathlib.Path, step: int):
    """Opens the file at `path`, and drops records after `step`."""
    super().__init__(path, lambda r: (r["step"], r["kind"]), kinds={"step": int, "kind": str})
    self.replace([r for r in self.records.values() if r["step"] <= step])

  def last(self, kind: str) -> dict | None:
    """Returns the last record of a kind."""
    return next((r for r in reversed(self.records.values()) if r["kind"] == kind), None)


def check_output(output: pathlib.Path, config: dict[str, Any]) -> None:
  """Writes the config to the output folder, or checks the one that is there.

  Raises:
    ValueError: the folder holds a run with another config, or other files.
  """
  path = output / "config.json"
  text = text_files.to_json(config, indent=2) + "\n"
  if path.exists():
    existing = _flat(typed.read(path))
    different = [k for k, v in _flat(json.loads(text)).items() if existing.get(k) != v]
    if different:
      raise ValueError(
        f"{output} holds a run with another config (it differs in {', '.join(different)}): give "
        "another --output, or the flags of that run"
      )
  elif output.exists() and any(p.name not in _OWN for p in output.iterdir()):
    raise ValueError(f"{output} is not empty and holds no training run: give another --output")
  else:
    app.write_atomically(path, text)


def _flat(values, prefix=""):
  flat = {}
  for name, value in values.items():
    flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def describe_machine() -> str:
  found = machine.describe(machine.pin(None))
  cores = f"{found['cores']} core{'s' if found['cores'] > 1 else ''}"
  accelerator = "" if found["platform"] == "cpu" else f", {found['device']}"
  return f"{found['cpu']}, {cores}{accelerator}"


def run(
  output: pathlib.Path,
  init: Callable[[], TrainState],
  step_fn: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array], int]],
  evaluate: Callable[[TrainState], dict[str, float]],
  *,
  num_steps: int,
  log_every: int,
  save_every: int,
  evaluate_every: int,
  evaluate_first: bool = False,
) -> tuple[TrainState, Metrics]:
  """Trains from the last saved state in `output`, or from scratch.

  Args:
    output: the folder of the run.
    init: returns the initial state; compiled.
    step_fn: maps a state, which it may consume, and the index of the step to the next state,
      scalars with "loss" among them, and the number of tokens.
    evaluate: returns scores of a state.
    num_steps: number of steps.
    log_every, save_every, evaluate_every: steps between log lines, saved states and evaluations;
      all happen after the last step too.
    evaluate_first: whether to evaluate the initial state.

  Returns:
    The final state, and the metrics. The last record of kind "training" has the number of
    tokens and the seconds of training without evaluations.

  Raises:
    ValueError: the loss is not finite.
  """
  from orbax.checkpoint import v1 as ocp  # slow

  keep: Any = ocp.training.preservation_policies.LatestN(2)
  with ocp.training.Checkpointer(
    str((output / "states").absolute()), preservation_policy=keep, cleanup_tmp_directories=True
  ) as saver:
    state = jax.jit(init)()
    if saver.latest is not None:
      saved = output / "states" / str(saver.latest.step)
      with orbax_storage.reading(f"the saved state {saved}", "delete it and rerun"):
        state = saver.load(saver.latest.step, state)
    first = int(state.step)
    metrics = Metrics(output / "metrics.jsonl", first)

    def write_evaluation(step):
      scores = evaluate(state)
      record = {"step": step, "kind": "evaluation", **scores, "seconds": round(seconds, 2)}
      metrics.add([record])
      values = ", ".join(f"{k} {v:.4g}" for k, v in scores.items())
      tqdm.write(f"step {step}, {seconds / 60:.1f} minutes of training: {values}")

    before = metrics.last("training") or {"tokens": 0, "seconds": 0.0}
    tokens, seconds = before["tokens"], before["seconds"]
    if evaluate_first and metrics.last("evaluation") is None:
      write_evaluation(first)
    start = time.monotonic()
    mark = tokens, seconds  # the rate is measured from here
    progress = tqdm(total=num_steps, initial=first, unit="step", mininterval=2, dynamic_ncols=True)
    for step in range(first + 1, num_steps + 1):
      state, values, count = step_fn(state, step - 1)
      tokens += count
      progress.update()
      saves = step % save_every == 0 or step == num_steps
      if saves or step % log_every == 0:
        values = {k: float(f"{float(v):.6g}") for k, v in values.items()}
        seconds, start = seconds + time.monotonic() - start, time.monotonic()
        rate = (tokens - mark[0]) / max(seconds - mark[1], 1e-3)
        mark = tokens, seconds
        record = {"tokens": tokens, "tokens_per_second": round(rate), "seconds": round(seconds, 2)}
        metrics.add([{"step": step, "kind": "training", **values, **record}])
        progress.set_postfix(loss=f"{values['loss']:.4f}")
        if not np.isfinite(values["loss"]):
          raise ValueError(
            f"the loss is {values['loss']} at step {step}: give a lower --learning_rate"
          )
      if step % evaluate_every == 0 or step == num_steps:
        jax.block_until_ready(state)
        seconds += time.monotonic() - start
        write_evaluation(step)
        start = time.monotonic()
      if saves:
        with orbax_storage.checksums():
          saver.save(step, state)
    progress.close()
  return state, metrics
