"""Reports runs and tunings on one page with tables and figures.

  python -m experiments.report --runs='results/compare/*,results/olmoe-n32' \\
      --tune='results/tune/*' --output=results/report

--runs are folders of finished runs (see `experiments.records.runs`), --tune folders of
`experiments.tune`. Every run is compared with --baseline, paired by example. Writes
`report.md`, its figures as PNG and PDF, and all comparisons as `comparisons.json` to
--output.

From each record it reads the metrics `exact_match`, `acc` or `pass@1` (the first one
present, also with a harness filter), `nll`, `fitted_nll` (at an output temperature fitted
on validation data) and `tokens`; for calibration the lists `confidences`,
`fitted_confidences` and `correct`, one entry per event. From the costs it reads `tokens`,
`seconds`, `forward_passes`, `flops`, `unique_experts_read` with `steps`, and `peak_bytes`.
Missing entries are reported as not measured.
"""

import pathlib
import re
import shlex
import sys

from absl import flags
from tqdm import tqdm

from experiments.analysis import comparisons, drawing, pictures, report_page
from experiments.analysis import run_results as results_lib
from experiments.cli import app, text_files

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_list("runs", [], "Folders of runs; * matches several.")
  flags.DEFINE_list("tune", [], "Folders of tunings; * matches several.")
  flags.DEFINE_string(
    "baseline",
    "baseline",
    "Run that the others are compared with: its label, name, folder or method.",
  )
  flags.DEFINE_string("output", "results/report", "Folder of the report.")


def main(argv) -> None:
  del argv
  if not FLAGS.runs and not FLAGS.tune:
    raise ValueError("nothing to report: set --runs, --tune or both")
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
  """Writes the report and its figures.

  Args:
    runs: the runs, the baseline first.
    baseline: the baseline, or None without runs.
    tunings: the tunings.
    output: the folder.
    command: the command that the report states.

  Returns:
    A one-line summary.
  """
  tasks = comparisons.tasks_of(runs)
  total = 3 * len(tasks) * len(runs) + 2 * len(tasks) + 1 + len(tunings)
  with tqdm(total=total, unit="part", file=sys.stderr) as bar:
    quality = comparisons.quality(runs, baseline, bar.update)
    likelihoods = comparisons.likelihood(runs, baseline, bar.update)
    calibrations = comparisons.calibrations(runs, baseline, bar.update)
    costs = comparisons.costs(runs)
    drawn = {}  # {section: [Markdown of a figure]}

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
        pictures.quality_against_cost(quality, likelihoods, costs, runs[0].label, task),
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
    ("Significant differences", report_page.findings(quality, likelihoods, calibrations, baseline))
  ]
  if baseline:
    sections += [
      ("Results", report_page.quality_section(quality, baseline)),
      ("Perplexity and output temperature", report_page.likelihood_section(likelihoods, baseline)),
      ("Calibration", report_page.calibration_section(calibrations, baseline)),
      ("Cost", report_page.cost_section(costs)),
      ("Statistical power", report_page.power_section(comparisons.power(quality), likelihoods)),
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
    line.comparison.to_json()
    for lines in (quality, likelihoods, calibrations)
    for line in lines
    if line.comparison
  ]
  app.write_atomically(output / "comparisons.json", text_files.to_json(compared, indent=2) + "\n")
  significant = sum(c["is_significant"] for c in compared)
  count = report_page.count
  return (
    f"Saved {output}/report.md with {count(sum(map(len, drawn.values())), 'figure')}: "
    f"{count(len(runs), 'run')}, {count(len(tunings), 'tuning')}, "
    f"{significant} of {count(len(compared), 'comparison')} significant."
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
  app.run(
    main,
    not_distributed="it reads results and runs no model",
    needs=("matplotlib", "scipy", "tabulate"),
  )


if __name__ == "__main__":
  program()
