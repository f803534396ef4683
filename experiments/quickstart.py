"""Compares the baseline with rosters of growing size on two small models of this package.

  python -m experiments.quickstart

The models solve arithmetic word problems. For each of them it runs `experiments.compare` and
prints a table of perplexity, accuracy and time, and one problem solved token by token; then it
draws quickstart.png. Rerun with the same flags, it resumes. Takes the flags of
`experiments.compare`; --num_members is the largest roster.
"""

from __future__ import annotations

import pathlib
import time

from absl import flags
import numpy as np

from experiments import compare, tasks
from experiments.analysis import comparisons, drawing, run_results
from experiments.analysis.paired_statistics import Difference
from experiments.cli import app
from experiments.cli.extras import matplotlib, tabulate
from experiments.evaluation import methods
from experiments.evaluation.engine import Engine
from experiments.evaluation.requests import TaskRequests

FLAGS = flags.FLAGS
DEFAULTS = {
  "dtype": "float32",
  "num_members": 16,
  "tau": "0.3",
  "num_examples": 160,
  "max_new_tokens": 64,
  "batch_size": 40,
  "output": "results/quickstart",
}


def define_flags() -> None:
  compare.define_flags(checkpoint=app.EMBEDDED + "wordmath_overtrained")
  flags.DEFINE_list(
    "checkpoints",
    [app.EMBEDDED + name for name in ("wordmath_overtrained", "wordmath_control")],
    "Models to compare on, each as in --checkpoint.",
  )
  for name, value in DEFAULTS.items():
    FLAGS.set_default(name, value)


def sizes() -> list[int]:
  """Returns the roster sizes: powers of two below --num_members, and --num_members."""
  return [2**i for i in range(1, 31) if 2**i < FLAGS.num_members] + [FLAGS.num_members]


def summarize(folder: pathlib.Path, task: str) -> list[dict]:
  """Returns a row of figures for the baseline and for each roster, from the runs of `compare`."""
  results = run_results.load_runs([str(folder / "*")])
  baseline = run_results.find_baseline(results, methods.Baseline.NAME)
  results = [baseline] + sorted(
    (r for r in results if r is not baseline), key=lambda r: r.settings["roster"]["num_members"]
  )
  lines = comparisons.likelihood(results, baseline)
  costs = comparisons.costs(results)
  return [
    {
      "result": quality.result,
      "num_members": quality.result.settings["roster"]["num_members"],
      "perplexity": raw,
      "temperature": quality.result.output_temperatures[task],
      "fitted": fitted,
      "accuracy": quality,
      "time": (costs[0].tokens_per_second or np.nan) / (cost.tokens_per_second or np.nan),
    }
    for quality, raw, fitted, cost in zip(
      comparisons.quality(results, baseline), lines[::2], lines[1::2], costs, strict=True
    )
  ]


def _interval(difference: Difference | None, places: int, star: bool = False) -> str:
  if difference is None:
    return ""
  d = difference
  return f"{d.value:+.{places}f} [{d.low:+.{places}f}, {d.high:+.{places}f}]{' *' if star else ''}"


def _compared(comparison, places):
  return comparison and _interval(comparison.difference, places, comparison.is_significant)


def table(rows: list[dict]) -> str:
  return tabulate.tabulate(
    [
      [
        f"roster, n = {r['num_members']}" if i else "baseline (n = 1)",
        f"{r['perplexity'].perplexity.value:.4f}",
        _interval(r["perplexity"].difference, 2),
        f"{r['temperature']:.2f}",
        f"{r['fitted'].perplexity.value:.4f}",
        _compared(r["fitted"].comparison, 2),
        f"{r['accuracy'].value.value:.1f}",
        _compared(r["accuracy"].comparison, 1),
        f"{r['time']:.2f}",
      ]
      for i, r in enumerate(rows)
    ],
    headers=[
      "",
      "perplexity",
      "difference from\nbaseline (%)",
      "fitted\nT",
      "perplexity\nat fitted T",
      "difference from\nbaseline at fitted T (%)",
      "accuracy\n(%)",
      "difference from\nbaseline (points)",
      "time per\ntoken",
    ],
    disable_numparse=True,
    colalign=["left"] + ["right"] * 8,
  )


def findings(rows: list[dict]) -> str:
  """Returns what the table says of the largest roster, in sentences."""
  baseline, largest = rows[0], rows[-1]
  n, fitted, accuracy = (
    largest["num_members"],
    largest["fitted"].comparison,
    largest["accuracy"].comparison,
  )

  def verdict(comparison):
    return "significant" if comparison.is_significant else "not significant"

  return "\n".join(
    [
      f"Perplexity: the roster of {n} changes it by "
      f"{_interval(largest['perplexity'].difference, 2)} %; a single output temperature on the "
      f"baseline changes it by {_interval(baseline['fitted'].difference, 2)} %.",
      f"With an output temperature fitted to both, the roster changes it by "
      f"{_interval(fitted.difference, 2)} % ({verdict(fitted)}).",
      f"Accuracy: the roster of {n} changes it by {_interval(accuracy.difference, 1)} points "
      f"({verdict(accuracy)}).",
    ]
  )


def show_solution(checkpoint: str, rows: list[dict], task: tasks.Task) -> str:
  """Solves a problem again with the largest roster, and shows each token.

  It is a problem that the baseline and the roster solve differently, if there is one, and that
  the roster gets right, if there is one.
  """
  answers = [r["result"].records[task.name] for r in (rows[0], rows[-1])]
  seed = FLAGS.seed
  examples = list(task.examples(FLAGS.split, FLAGS.data_dir, FLAGS.num_examples, FLAGS.chat))
  by_baseline, by_roster = (
    [(of[e.id][seed]["output"], of[e.id][seed]["metrics"][task.metric]) for e in examples]
    for of in answers
  )
  index = max(
    range(len(examples)),
    key=lambda i: (by_baseline[i][0] != by_roster[i][0], by_roster[i][1] - by_baseline[i][1], -i),
  )
  params, config, tokenizer = app.open_model(checkpoint, FLAGS.dtype, FLAGS.mesh)
  # Its whole batch, for which everything is compiled already.
  first = index - index % FLAGS.batch_size
  asked = TaskRequests.of(
    app.request_builder(config, tokenizer), task, examples[first : first + FLAGS.batch_size]
  )
  base = app.roster_from_flags(config, check_idle=False)
  roster = methods.RosterOf(FLAGS.num_members).make(config, base).with_seed(seed)
  engine = Engine(params, config, tokenizer, roster, FLAGS.batch_size)
  completion = engine.answer(asked.all_answering)[index - first].completion

  def visible(token):
    return repr(tokenizer.decode([token], skip_special_tokens=False))

  def judged(answer):
    return f"{answer[0]} ({'correct' if answer[1] else 'wrong'})"

  lines = [
    f"Test problem {index}, token by token with n = {FLAGS.num_members}:",
    examples[index].prompt,
    f"Reference: {examples[index].reference}",
    f"Roster:    {judged(by_roster[index])}",
    f"Baseline:  {judged(by_baseline[index])}",
    "",
  ]
  for token, clean, log_prob in zip(
    completion.tokens, completion.clean_tokens, completion.log_probs
  ):
    note = f"   <- the clean member alone would choose {visible(clean)}" if token != clean else ""
    lines.append(f"  {visible(token):>15}  p = {np.exp(log_prob):.3f}{note}")
  return "\n".join(lines)


def draw(models: dict[str, list[dict]]) -> matplotlib.figure.Figure:
  """Draws perplexity, accuracy and time against n, in a row of panels for each model."""
  figure, axes = drawing.axes(3, len(models), width=3.6, height=2.9)
  zero = Difference(0.0, 0.0, 0.0)
  for (name, rows), (left, middle, right) in zip(models.items(), axes, strict=True):
    n = [r["num_members"] for r in rows]
    compared = [r["accuracy"].comparison for r in rows]
    reductions = {
      kind: [-(r[kind].difference or zero) for r in rows] for kind in ("perplexity", "fitted")
    }
    for axis, differences, label, style in (
      (left, reductions["perplexity"], "output temperature T = 1", {}),
      (left, reductions["fitted"], "output temperature fitted", {"color": "0.5"}),
      (middle, [c and c.difference for c in compared], None, {}),
    ):
      values, bars = drawing.bars([d or zero for d in differences])
      axis.errorbar(n, values, yerr=bars, label=label, **drawing.line(len(style)) | style)
      drawing.zero(axis)
    right.plot(n, [r["time"] for r in rows], label="roster", color="black", marker="o")
    right.plot(n, n, color="0.5", linestyle=":", label="n forward passes in turn")
    right.set_yscale("log", base=2)
    right.set_yticks(n, [str(x) for x in n])
    right.minorticks_off()
    right.legend(fontsize=8, frameon=False)
    left.set_ylabel("perplexity reduction\nfrom baseline (%)")
    middle.set_ylabel("accuracy, difference\nfrom baseline (points)")
    right.set_ylabel("time per token\n(baseline = 1), log scale")
    middle.set_title(name, fontsize=10)
    for axis in (left, middle, right):
      drawing.members_axis(axis, n)
  drawing.legend(figure, axes[0, 0])
  figure.suptitle(
    "Rosters of n members and the baseline (n = 1): router temperature "
    f"{FLAGS.tau}, {FLAGS.num_examples} problems, 95 % intervals",
    fontsize=10,
  )
  return figure


def main(argv) -> None:
  del argv
  if FLAGS.num_members < 2:
    raise ValueError(f"--num_members must be at least 2, got {FLAGS.num_members}")
  for checkpoint in FLAGS.checkpoints:  # check all before any work
    app.roster_from_flags(app.load_config(checkpoint), check_idle=False)
  begin, output, models, texts = time.perf_counter(), pathlib.Path(FLAGS.output), {}, []
  (task,) = (tasks.get(name) for name in FLAGS.tasks)
  FLAGS.methods = ";".join(map(str, [methods.Baseline(), *map(methods.RosterOf, sizes())]))
  for checkpoint in FLAGS.checkpoints:
    name = pathlib.Path(checkpoint.removeprefix(app.EMBEDDED)).name
    FLAGS.checkpoint, FLAGS.output = checkpoint, str(output / name)
    compare.run(count_experts=False)
    rows = models[name] = summarize(output / name, task.name)
    solution = show_solution(checkpoint, rows, task)
    texts.append(f"## {name}\n\n{table(rows)}\n\n{findings(rows)}\n\n{solution}\n")
  text = (
    f"{FLAGS.num_examples} test problems, greedy decoding, Clean Cache, router temperature "
    f"{FLAGS.tau}.\nIn brackets: 95 % intervals of the difference on the same "
    "problems. *: significant, after Holm's correction.\nFitted T: output "
    f"temperature fitted on {FLAGS.num_validation} validation problems. Time per token: "
    "relative to the baseline.\n\n" + "\n".join(texts)
  )
  print("\n" + text)
  app.write_atomically(output / "table.txt", text)
  if app.is_first_process():
    drawing.save(draw(models), output / "quickstart", kinds=["png"])
  print(
    f"Saved {output}/quickstart.png, table.txt and all answers; {time.perf_counter() - begin:.0f} "
    f"s. More on them: python -m experiments.report --runs='{output / name}/*'"
  )


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, needs=("matplotlib", "scipy", "tabulate"))


if __name__ == "__main__":
  program()
