"""Turns runs and tunings into one page with tables and pictures.

  python -m experiments.report --runs='results/compare/*,results/olmoe-n32' \\
      --tune='results/tune/*' --output=results/report

--runs are folders of finished runs (see `runs`), --tune folders of `experiments.tune`;
a pattern with * stands for the folders it finds. Every run is compared with
--baseline, paired by example. --output then holds `report.md`, its pictures as
PNG and PDF, and `comparisons.json` with all compared figures.

Of a line of a run it reads the metrics `exact_match`, `acc` or `pass@1` (the first
that is there, also with a filter of the harness behind it), `nll`, `fitted_nll` (at an
output temperature fitted on validation data) and `tokens`; and for calibration the
lists `confidences`, `fitted_confidences` and `correct`, one entry for each event; of
its costs `tokens`, `seconds`, `forward_passes`, `flops`, `unique_experts_read` with `steps`, and
`peak_bytes`. What is not there is said to be not measured.
"""

import dataclasses
import json
import pathlib
import re
import shlex
import sys

from absl import flags
from tqdm import tqdm

from experiments.analysis import comparisons, drawing, pictures, report_page
from experiments.analysis import run_results as results_lib
from experiments.cli import app

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_list("runs", [], "Folders of runs, or patterns with * for several.")
  flags.DEFINE_list("tune", [], "Folders of tunings, or patterns with * for several.")
  flags.DEFINE_string(
    "baseline",
    "baseline",
    "The run that the others are compared with: its label, name, folder or method.",
  )
  flags.DEFINE_string("output", "results/report", "Folder of the page.")


def main(argv) -> None:
  del argv
  if not FLAGS.runs and not FLAGS.tune:
    raise ValueError("there is nothing to report: give --runs, --tune or both")
  runs = results_lib.load_runs(FLAGS.runs)
  tunings = results_lib.load_tunings(FLAGS.tune)
  baseline = results_lib.find_baseline(runs, FLAGS.baseline) if runs else None
  if baseline:
    results_lib.check_comparable(runs, baseline)
    runs = [baseline, *(r for r in runs if r is not baseline)]
  command = "python -m experiments.report " + shlex.join(sys.argv[1:])
  print(write(runs, baseline, tunings, pathlib.Path(FLAGS.output), command))


def write(
  runs: list[results_lib.Result],
  baseline: results_lib.Result | None,
  tunings: list[results_lib.Tuning],
  output: pathlib.Path,
  command: str,
) -> str:
  """Writes the page and its pictures.

  Args:
    runs: the baseline first.
    baseline: one of them, or None without runs.
    tunings: what was tuned.
    output: the folder.
    command: what the page says that it was made with.

  Returns:
    One line that sums it up.
  """
  tasks = comparisons.tasks_of(runs)
  total = 3 * len(tasks) * len(runs) + 2 * len(tasks) + 1 + len(tunings)
  with tqdm(total=total, unit="part", file=sys.stderr) as bar:
    quality = comparisons.quality(runs, baseline, bar.update)
    likelihoods = comparisons.likelihood(runs, baseline, bar.update)
    calibrations = comparisons.calibrations(runs, baseline, bar.update)
    costs = comparisons.costs(runs)
    drawn = {}  # {section: [Markdown of a picture]}

    def draw(section, name, caption, figure):
      if figure is not None:
        drawing.save(figure, output / name)
        drawn.setdefault(section, []).append(report_page.picture(name, caption))
      bar.update()

    for task in tasks:
      draw(
        "cost",
        f"cost-{_file_name(task)}",
        f"{task}: quality against each cost.",
        pictures.quality_against_cost(quality, likelihoods, costs, baseline.label, task),
      )
      draw(
        "calibration",
        f"reliability-{_file_name(task)}",
        f"{task}: reliability diagrams.",
        pictures.reliability(calibrations, task),
      )
    draw(
      "tuning", "temperatures", "Router temperature of each layer.", pictures.temperatures(tunings)
    )
    for t in tunings:
      draw("tuning", f"history-{_file_name(t.name)}", f"{t.name}: trials.", pictures.history(t))

  sections = [
    ("What is significant", report_page.findings(quality, likelihoods, calibrations, baseline))
  ]
  if runs:
    sections += [
      ("Results", report_page.quality_section(quality, baseline)),
      ("Perplexity and output temperature", report_page.likelihood_section(likelihoods, baseline)),
      ("Calibration", report_page.calibration_section(calibrations, baseline)),
      ("Cost", report_page.cost_section(costs)),
      (
        "What could have been seen",
        report_page.power_section(comparisons.power(quality), likelihoods),
      ),
    ]
  sections += [
    ("Tuning", report_page.tuning_section(tunings)),
    ("Settings", report_page.settings_section(runs, tunings, command)),
  ]
  pictures_of = {"Calibration": "calibration", "Cost": "cost", "Tuning": "tuning"}
  text = "# Report\n\n" + _head(runs, baseline, tunings, tasks)
  for title, body in sections:
    shown = drawn.get(pictures_of.get(title), [])
    text += "\n\n" + "\n\n".join([f"## {title}", body, *shown])
  app.write_atomically(output / "report.md", text + "\n")
  compared = [
    dataclasses.asdict(line.comparison) | {"is_significant": line.comparison.is_significant}
    for lines in (quality, likelihoods, calibrations)
    for line in lines
    if line.comparison
  ]
  app.write_atomically(output / "comparisons.json", json.dumps(compared, indent=2) + "\n")
  significant = sum(c["is_significant"] for c in compared)
  return (
    f"Saved {output}/report.md with {report_page.count(sum(map(len, drawn.values())), 'picture')}: "
    f"{report_page.count(len(runs), 'run')}, {report_page.count(len(tunings), 'tuning')}, {significant} of "
    f"{report_page.count(len(compared), 'comparison')} significant."
  )


def _head(runs, baseline, tunings, tasks):
  parts = []
  if baseline:
    parts.append(
      f"{report_page.count(len(runs), 'run')} on {', '.join(tasks)}, compared with "
      f"{baseline.label}; model {baseline.settings.get('checkpoint', 'not recorded')}, "
      f"fingerprint {(baseline.model or 'not recorded')[:16]}."
    )
  if tunings:
    parts.append(
      f"{report_page.count(len(tunings), 'tuning')}: {', '.join(t.name for t in tunings)}."
    )
  return " ".join(parts)


def _file_name(task):
  return re.sub(r"[^A-Za-z0-9_+-]+", "-", task)


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it reads results and runs no model")


if __name__ == "__main__":
  program()
