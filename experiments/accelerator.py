"""Checks and times everything that matters on an accelerator, within a budget.

  python -m experiments.accelerator --output=results/h100 --budget_s=480

Stages in order of worth: the device's bandwidth and matmul rate, which give the floors of all that
follows; expert strategies on one layer of published models; decode steps and scoring of OLMoE-1B-7B
with random weights; their time by scope, from a profiler trace; the embedded models, whose tokens
must be those of the CPU; generation against n (figure 4 of the paper); transformers, where torch is
installed. No network or data is needed. On a CPU all sizes are small.

Each result is appended to results.jsonl at once, failures with their reason; table.txt has the
summary, also after SIGTERM. Rerun with the same --output, it continues after what is there. The
summary ends with the crossovers of expert strategies, to paste into `roe_jax.experts.choices`.
"""

from collections.abc import Callable, Sequence
import pathlib
import time
from typing import Any

from absl import flags
import jax

from experiments.benchmarks import crossover_fit, device_stages, expert_kernels, supervisor
from experiments.benchmarks.floors import Rates
from experiments.benchmarks.supervisor import FAILED, Stage
from experiments.cli import app
from experiments.records import store

FLAGS = flags.FLAGS
LIMITS_FOR = 480.0  # seconds that the stages' limits are meant for
Record = dict[str, Any]
STAGES = ("experts", "steps", "profile", "cpu_tokens", "tokens", "figure4", "transformers")


def define_flags() -> None:
  flags.DEFINE_string("output", "results/accelerator", "Folder for the results.")
  flags.DEFINE_float("budget_s", LIMITS_FOR, "Seconds for everything.", lower_bound=1)
  flags.DEFINE_list("stages", list(STAGES), "Stages to run after the machine's.")
  flags.DEFINE_bool("toy", None, "Whether sizes are small. Default: on CPUs only.")
  flags.DEFINE_bool("retry", False, "Measure again what failed in an earlier run.")


def main(argv: Sequence[str]) -> None:
  del argv
  begin = time.monotonic()
  if unknown := sorted(set(FLAGS.stages) - set(STAGES)):
    raise ValueError(f"--stages: unknown {unknown[0]!r}; choose from {', '.join(STAGES)}")
  output, deadline = pathlib.Path(FLAGS.output), begin + FLAGS.budget_s
  machine = store.SavedValues(None, {})
  first = device_stages.machine_stage(FLAGS.toy)
  supervisor.run_stage(first, machine, deadline)
  (record,) = (record for _, record in machine.items()) if machine.items() else ({},)
  if FAILED in record or not record:
    raise ValueError(
      f"the device could not be measured: {record.get(FAILED, 'the budget is too short')}"
    )
  toy = record["platform"] == "cpu" if FLAGS.toy is None else FLAGS.toy
  settings = {"device": record["device"], "jax": record["jax"], "toy": toy}
  saved = store.SavedValues(output / "results.jsonl", settings)
  saved.put("machine/rates", record)
  if FLAGS.retry:
    for name, value in list(saved.items()):
      if FAILED in value:
        saved.forget(name)
  rates = Rates(record["bandwidth"], record["flops"])
  stages = [s for s in device_stages.stages(toy, rates) if s.name in FLAGS.stages]
  # A laptop that is busy may take long to compile; a device is lent for minutes.
  stages = [s.scaled(FLAGS.budget_s / LIMITS_FOR, patience=5 if toy else 1) for s in stages]

  def write():
    text = summary([first, *stages], saved)
    app.write_atomically(output / "table.txt", text)
    return text

  try:
    supervisor.run(stages, saved, deadline, write)
  finally:  # also after SIGTERM
    print(write())
    print(f"Saved {output}/results.jsonl and table.txt; {time.monotonic() - begin:.0f} s.")


def _number(key: str, form: str = ".3f") -> Callable[[Record], str]:
  return lambda r: "" if r.get(key) is None else format(r[key], form)


def _mebibytes(key: str) -> Callable[[Record], str]:
  return lambda r: "" if r.get(key) is None else f"{r[key] / 2**20:.1f}"


def _scopes(record: Record) -> str:
  return ", ".join(f"{name} {ms:.3f}" for name, ms in record["scopes_ms"].items())


_TO_FLOOR = {
  "ms": _number("ms"),
  "floor, ms": _number("floor_ms"),
  "ratio to floor": _number("to_floor", ".2f"),
}
_MEMORY = {
  "temporaries, MiB": _mebibytes("temp_bytes"),
  "device peak so far, MiB": _mebibytes("peak_device_bytes"),
}
COLUMNS: dict[str, dict[str, Callable[[Record], Any]]] = {
  "machine": {
    "device": lambda r: r["device"],
    "driver": lambda r: r["driver"] or "",
    "jax": lambda r: r["jax"],
    "copy, GB/s": lambda r: f"{r['copy_bandwidth'] / 1e9:.1f}",
    "read, GB/s": lambda r: f"{r['read_bandwidth'] / 1e9:.1f}",
    "bfloat16, TFLOP/s": lambda r: f"{r['bfloat16_matmul_flops'] / 1e12:.2f}",
    "float32, TFLOP/s": lambda r: f"{r['float32_matmul_flops'] / 1e12:.2f}",
  },
  "experts": {
    "error": _number("error", ".1e"),
    **_TO_FLOOR,
    "unique experts": _number("unique_experts", ".1f"),
    "": lambda r: r["differs"] or "",
  },
  "steps": {**_TO_FLOOR, "unique experts": _number("unique_experts", ".1f"), **_MEMORY},
  "profile": {
    "busy, ms per step": _number("busy_ms"),
    "idle, ms per step": _number("idle_ms"),
    "longest gaps, us": lambda r: " ".join(f"{gap:.0f}" for gap in r["gaps_us"][:3]),
    "ms per step": _scopes,
  },
  "cpu_tokens": {"sequences": lambda r: len(r["tokens"]), "s": _number("took", ".1f")},
  "tokens": {"platform": lambda r: r["platform"], "equal to the CPU's": lambda r: r["equal"]},
  "figure4": {
    "ms per token": _number("ms_per_token"),
    "ratio to n = 1": _number("time_ratio", ".2f"),
    "program, MiB": _mebibytes("bytes"),
    "device peak so far, MiB": _mebibytes("peak_device_bytes"),
    "W": _number("watts", ".0f"),
    "J per token": _number("joules_per_token"),
  },
  "transformers": {
    "roe_jax, ms": lambda r: f"{r['ms']['roe_jax']:.3f}",
    "transformers, ms": lambda r: f"{r['ms']['transformers']:.3f}",
    "experts": lambda r: r["experts"],
    "cache": lambda r: r["cache"],
  },
}


def _with_comparisons(records: dict[str, Record]) -> dict[str, Record]:
  """Adds what compares records: tokens with the CPU's, and times with those of n = 1."""
  found = {}
  for name, r in records.items():
    stage, _, case = name.partition("/")
    if FAILED in r:
      pass
    elif stage == "tokens":
      expected = records.get(f"cpu_tokens/{case}", {}).get("tokens")
      equal = "CPU not measured"
      if expected:
        count = sum(ours == theirs for ours, theirs in zip(r["tokens"], expected, strict=True))
        equal = f"{count} of {len(expected)}"
      r = r | {"equal": equal}
    elif stage == "figure4":
      first = records.get(f"{name.rpartition('=')[0]}=1", {}).get("ms_per_token")
      r = r | {"time_ratio": first and r["ms_per_token"] / first}
    found[name] = r
  return found


def summary(stages: Sequence[Stage], saved: store.SavedValues) -> str:
  """Returns the tables of all stages, what failed and why, and the crossovers to paste."""
  records = _with_comparisons(dict(saved.items()))
  parts, failures = [], []
  for stage in stages:
    of_stage = {
      name.removeprefix(stage.name + "/"): r
      for name, r in records.items()
      if name.startswith(stage.name + "/")
    }
    failures += [f"{stage.name}/{n}: {r[FAILED]}" for n, r in of_stage.items() if FAILED in r]
    measured = {name: r for name, r in of_stage.items() if FAILED not in r}
    columns = COLUMNS[stage.name]
    rows = [[name, *(str(cell(r)) for cell in columns.values())] for name, r in measured.items()]
    title = f"{stage.title}: {len(measured)} of {len(stage.cases)} cases"
    parts.append(title + "\n" + aligned(["case", *columns], rows) if rows else title)
  if failures:
    parts.append("Failed:\n" + "\n".join(f"  {failure}" for failure in failures))
  kind = records["machine/rates"]["device"]
  if lines := crossover_fit.lines(kind, _finished_experts(stages, saved)):
    parts.append("For CROSSOVERS in roe_jax/experts/choices.py:\n" + "\n".join(lines))
  return "\n\n".join(parts) + "\n"


def _finished_experts(stages, saved):
  """Returns the records of experts at points where no promising strategy is missing."""
  stage = next((s for s in stages if s.name == "experts"), None)
  if stage is None:
    return []
  missing = {c.name.rpartition(" ")[0] for c in expert_kernels.promising(stage.todo(saved))}
  found = [(name.removeprefix("experts/"), r) for name, r in saved.items() if "strategy" in r]
  return [r for name, r in found if name.rpartition(" ")[0] not in missing]


def aligned(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table of text in columns, without a package for it."""
  widths = [max(map(len, column)) for column in zip(headers, *rows)]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for row in (headers, ["-" * width for width in widths], *rows)
  )


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  # The device belongs to the child processes.
  jax.config.update("jax_platforms", "cpu")
  # JAX itself needs scipy.
  app.run(main, not_distributed="it measures one device", needs=("scipy",))


if __name__ == "__main__":
  program()
