import dataclasses
import json
import re

import matplotlib.image
import numpy as np
import programs
import pytest
import synthetic_runs as synthetic

from experiments import report
from experiments.analysis import (
  calibration_error,
  comparisons,
  drawing,
  paired_statistics,
  pictures,
  report_page,
)
from experiments.analysis import run_results as results_lib

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
  monkeypatch.setattr(paired_statistics, "RESAMPLES", 400)
  monkeypatch.setattr(paired_statistics, "FLIPS", 399)


def write_report(output, runs=(), tune=(), baseline="baseline"):
  """What the program does with its flags; the page and the line it prints."""
  runs = results_lib.load_runs(runs)
  found = results_lib.find_baseline(runs, baseline) if runs else None
  if found:
    results_lib.check_comparable(runs, found)
    runs = [found, *(r for r in runs if r is not found)]
  line = report.write(runs, found, results_lib.load_tunings(tune), output, "a command")
  return (output / "report.md").read_text(), line


def section(text, title):
  return re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", text, re.DOTALL).group(1)


def check_markdown(text, folder):
  """Tables have as many cells in each row, and what is linked is there and not empty."""
  rows = 0
  for block in text.split("\n\n"):
    lines = [line for line in block.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(cells) <= 1, block
    rows += len(lines)
  for link in re.findall(r"\]\(([^)]+)\)", text):
    assert (folder / link).stat().st_size > 3000, link
    if link.endswith(".png"):
      pixels = matplotlib.image.imread(folder / link)
      assert 0.003 < (pixels[..., :3].mean(axis=-1) < 0.9).mean() < 0.7, f"{link} looks empty"
  return rows


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  folder = tmp_path_factory.mktemp("study")
  synthetic.write_study(folder / "runs")
  synthetic.write_tuning(folder / "tune" / "gsm8k")
  return folder


@pytest.fixture(scope="module")
def whole(study):
  """The page of all that there is, with its folder."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(paired_statistics, "RESAMPLES", 400)
    patch.setattr(paired_statistics, "FLIPS", 399)
    text, line = write_report(study / "report", [f"{study}/runs/*"], [f"{study}/tune/*"])
  return text, line, study / "report"


def test_a_page_has_whole_tables_and_pictures_that_are_there(whole):
  text, line, folder = whole
  assert check_markdown(text, folder) > 40
  for name in ("cost-wordmath", "reliability-wordmath", "temperatures", "history-gsm8k"):
    assert f"({name}.png)" in text and f"({name}.pdf)" in text
  assert re.fullmatch(
    r"Saved .*report.md with 4 figures: 4 runs, 1 tuning, \d+ of 11 "
    r"comparisons significant\.",
    line,
  )


def test_what_is_much_better_is_called_so_and_what_is_equal_is_not(whole):
  text = section(whole[0], "Significant differences")
  assert "wordmath: roster, n = 8 raises exact match against baseline" in text
  assert "k' = 4 raises exact match" not in text and "votes raises" not in text
  results = section(whole[0], "Results")
  assert re.search(r"k' = 4 .*\| 160 +\| 3 .*sign-flip.*no significant difference", results)
  assert re.search(r"roster, n = 8 .*\| 160 +\| 1 .*McNemar.*higher", results)


def test_perplexity_is_judged_against_the_fitted_baseline(whole):
  text = section(whole[0], "Perplexity and output temperature")
  # It lowers the perplexity, but less than an output temperature does.
  roster = next(line for line in text.splitlines() if "roster, n = 8  " in line)
  cells = [cell.strip() for cell in roster.split("|")]
  assert cells[7].startswith("-") and cells[8].startswith("+") and cells[11] == "higher"
  fitted = next(line for line in text.splitlines() if "roster, n = 8, fitted T" in line)
  assert "no significant difference" in fitted and "| 1.5 " in fitted
  assert any(re.search(r"\| baseline, fitted T +\|", line) for line in text.splitlines())


def test_calibration_is_told_before_and_after_with_the_name_of_its_error(whole):
  text = section(whole[0], "Calibration")
  assert "ECE, equal-mass" in text and "ECE, equal-width" in text
  before, after = (
    float(re.search(rf"\| {name} +\| 3200 +\| [^|]+\| ([\d.]+)", text).group(1))
    for name in ("baseline", "baseline, fitted T")
  )
  assert after < 0.5 * before


def test_costs_are_for_an_example(whole):
  text = section(whole[0], "Cost")
  cells = [
    c.strip()
    for c in next(line for line in text.splitlines() if "roster, n = 8" in line).split("|")
  ]
  assert cells[3:5] == ["800", "300"]  # 2000 tokens in 2.5 s; 3 x 16000 rows for 160
  assert float(cells[5]) == pytest.approx(3 * 8e9 / 160, rel=0.01)
  assert float(cells[6]) == pytest.approx(8 * (1 - np.exp(-2)), rel=0.01)
  assert cells[7] == "58"


def test_the_same_runs_in_another_order_give_the_same_figures(study, whole):
  runs = sorted((study / "runs").iterdir(), reverse=True)
  write_report(study / "again", map(str, runs), [f"{study}/tune/*"])
  once, again = (
    json.loads((study / output / "comparisons.json").read_text()) for output in ("report", "again")
  )
  assert len(once) == 11 and sorted(map(str, once)) == sorted(map(str, again))


def loaded(tmp_path, **runs):
  for name, correct in runs.items():
    synthetic.write_run(tmp_path / name, name, correct)
  return results_lib.load_runs([str(tmp_path / name) for name in runs])


def test_ten_points_more_on_400_examples_are_clear_and_none_are_not(tmp_path):
  rng = np.random.default_rng(0)
  found = {"better": 0, "same": 0}
  for trial in range(15):
    baseline = synthetic.answers(rng, 400, 0.5)
    runs = loaded(
      tmp_path / str(trial),
      baseline=baseline,
      better=synthetic.answers(rng, 400, baseline.mean() + 0.1, baseline),
      same=synthetic.answers(rng, 400, baseline.mean(), baseline),
    )
    for line in comparisons.quality(runs, runs[0])[1:]:
      found[line.result.label] += line.comparison.is_significant
  assert found["better"] >= 13 and found["same"] <= 2


def test_a_table_of_many_equal_methods_shows_one_as_better_in_few_cases(tmp_path):
  rng = np.random.default_rng(1)
  errors = uncorrected = 0
  for trial in range(20):
    baseline = synthetic.answers(rng, 200, 0.5)
    runs = loaded(
      tmp_path / str(trial),
      baseline=baseline,
      **{f"method{i}": synthetic.answers(rng, 200, baseline.mean(), baseline) for i in range(8)},
    )
    found = [line.comparison for line in comparisons.quality(runs, runs[0])[1:]]
    errors += any(c.is_significant for c in found)
    uncorrected += any(c.test.p < 0.05 for c in found)
  assert errors <= 4  # more in 0.3 % of cases, at 5 %
  assert uncorrected > errors


def test_two_runs_without_anything_else_make_a_page_that_says_what_is_not_measured(tmp_path):
  rng = np.random.default_rng(2)
  baseline = synthetic.answers(rng, 100, 0.5)
  synthetic.write_run(tmp_path / "a", "baseline", baseline)
  synthetic.write_run(tmp_path / "b", "a|b", synthetic.answers(rng, 100, 0.5, baseline))
  text, line = write_report(tmp_path / "out", [str(tmp_path / "a"), str(tmp_path / "b")])
  check_markdown(text, tmp_path / "out")
  assert "with 0 figures: 2 runs" in line
  assert "No significant difference from baseline in task results, in 1 comparison." in text
  assert "No perplexities are compared" in text
  assert "Perplexities of reference texts are not measured." in text
  assert "Calibration is not measured" in text and "Tuning is not measured" in text
  assert section(text, "Cost").count("not measured") == 10
  assert "\na command\n```" in text


def test_a_tuning_alone_makes_a_page(tmp_path):
  synthetic.write_tuning(tmp_path / "x", profile=False)
  text, line = write_report(tmp_path / "out", tune=[str(tmp_path / "x")])
  check_markdown(text, tmp_path / "out")
  assert "1 figure: 0 runs, 1 tuning" in line  # no map of temperatures without a profile
  assert "x: confirmation not measured." in text
  assert "| x        | objective   | 31" in text


@pytest.mark.parametrize(
  "value, text",
  [
    ([0.3] * 6, "0.3 (6 times)"),
    ([0.0, 0.25], "[0.0, 0.25]"),
    (1.1608729895, "1.16087"),
    ([f"t/{i}" for i in range(60)], "t/0 ... t/59 (60)"),
    ({"a": {"b": None}}, "a b null"),
  ],
)
def test_settings_are_told_in_one_short_line(value, text):
  assert report_page._inline(value) == text


def test_without_the_fitted_baseline_no_claim_is_made(tmp_path):
  rng = np.random.default_rng(3)
  logits = np.abs(rng.normal(1.0, 2.0, (60, 10)))
  right = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
  texts = synthetic.chances(rng, logits, right, 2.0)
  unfitted = {k: v for k, v in texts.items() if not k.startswith("fitted")}
  baseline = synthetic.answers(rng, 60, 0.5)
  synthetic.write_run(tmp_path / "baseline", "baseline", baseline, **unfitted)
  synthetic.write_run(
    tmp_path / "roster", "roster", baseline, **synthetic.chances(rng, logits, right, 1.2)
  )
  text, _ = write_report(tmp_path / "out", [f"{tmp_path}/*"])
  perplexity = section(text, "Perplexity and output temperature")
  assert "none: baseline at its fitted T is not measured" in perplexity
  assert "without it no claim about perplexity can be made" in perplexity
  assert "without them no claim about calibration can be made" in section(text, "Calibration")
  assert "raises perplexity" not in text and "lowers perplexity" not in text


def test_examples_are_paired_by_what_they_are_called_and_missing_ones_are_counted(tmp_path):
  rng = np.random.default_rng(4)
  baseline = synthetic.answers(rng, 50, 0.5)
  synthetic.write_run(tmp_path / "baseline", "baseline", baseline)
  order = rng.permutation(50)[:40]  # another order, ten missing
  synthetic.write_run(
    tmp_path / "same", "same", baseline[order], examples=[f"wordmath/test/{i}" for i in order]
  )
  runs = results_lib.load_runs([f"{tmp_path}/*"])
  line = comparisons.quality(runs, runs[0])[1]
  assert line.comparison.difference == paired_statistics.Difference(0.0, 0.0, 0.0, 1.0, 1.0)
  assert (line.examples, line.missing) == (40, 10)
  assert (
    "wordmath: left out 10 examples that only one of same and baseline has; 40 paired."
    in report_page.quality_section(comparisons.quality(runs, runs[0]), runs[0])
  )


def test_other_events_than_the_baselines_are_shown_and_not_compared(tmp_path):
  rng = np.random.default_rng(5)
  baseline = synthetic.answers(rng, 40, 0.5)
  logits = np.abs(rng.normal(1.0, 2.0, (40, 10)))
  right = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
  synthetic.write_run(
    tmp_path / "baseline", "baseline", baseline, **synthetic.chances(rng, logits, right, 2.0)
  )
  synthetic.write_run(
    tmp_path / "votes",
    "votes",
    baseline,
    confidences=rng.random((40, 1)),
    outcomes=baseline[:, None],
  )
  text, _ = write_report(tmp_path / "out", [f"{tmp_path}/*"])
  assert (
    "Not compared, since their events differ from those of baseline: votes on wordmath."
    in section(text, "Calibration")
  )


@pytest.mark.parametrize(
  "settings, task, message",
  [
    ({"model": "other"}, "wordmath", "their model differs \\(other, f1f1"),
    ({"split": "validation"}, "wordmath", "their split differs \\(validation, test\\)"),
    ({}, "gsm8k", "no task in common \\(gsm8k; wordmath\\)"),
  ],
)
def test_runs_that_are_not_comparable_are_refused(tmp_path, settings, task, message):
  answers = np.ones(5)
  synthetic.write_run(tmp_path / "a", "baseline", answers)
  synthetic.write_run(tmp_path / "b", "b", answers, task=task, settings=settings)
  with pytest.raises(ValueError, match=f"cannot be compared with .*: .*{message}"):
    write_report(tmp_path / "out", [f"{tmp_path}/*"])
  assert not (tmp_path / "out").exists()


def test_runs_of_other_examples_are_refused(tmp_path):
  synthetic.write_run(tmp_path / "a", "baseline", np.ones(3))
  synthetic.write_run(tmp_path / "b", "b", np.ones(3), examples=["x", "y", "z"])
  with pytest.raises(ValueError, match="no example of wordmath in common; run both with"):
    write_report(tmp_path / "out", [f"{tmp_path}/*"])


def test_a_model_is_known_by_its_routers_and_a_missing_setting_is_not_another(tmp_path):
  for name, model in (
    ("baseline", {"name": "x", "experts_per_token": 2, "routers": "abc"}),
    ("k4", {"name": "./x", "experts_per_token": 4, "routers": "abc"}),
    ("none", None),
    ("chat", {"routers": "abc"}),
    ("other", {"routers": "abd"}),
  ):
    settings = {"model": model} | (
      {"chat": {}} if name == "chat" else {"chat": None} if name == "baseline" else {}
    )
    synthetic.write_run(tmp_path / name, name, np.ones(3), settings=settings)
  runs = {r.label: r for r in results_lib.load_runs([f"{tmp_path}/*"])}
  results_lib.check_comparable([runs["k4"], runs["none"]], runs["baseline"])
  with pytest.raises(ValueError, match="their model differs \\(abd, abc\\)"):
    results_lib.check_comparable([runs["other"]], runs["baseline"])
  with pytest.raises(ValueError, match="their chat differs"):
    results_lib.check_comparable([runs["chat"]], runs["baseline"])


def test_a_metric_of_the_harness_is_found_behind_its_filter(tmp_path):
  rng = np.random.default_rng(6)
  for name in ("baseline", "b"):
    synthetic.write_run(
      tmp_path / name,
      name,
      synthetic.answers(rng, 30, 0.5),
      metric="exact_match,strict-match",
      task="gsm8k",
    )
  runs = results_lib.load_runs([f"{tmp_path}/*"])
  lines = comparisons.quality(runs, runs[1])
  assert lines[0].metric == "exact_match,strict-match"
  assert lines[0].comparison.measure == "exact match (strict-match)"


def test_perplexities_of_other_texts_are_refused(tmp_path):
  for name, tokens in (("baseline", 10), ("b", 11)):
    synthetic.write_run(tmp_path / name, name, np.ones(5), nll=np.ones(5), tokens=[tokens] * 5)
  with pytest.raises(ValueError, match="different numbers of tokens of examples of wordmath"):
    write_report(tmp_path / "out", [f"{tmp_path}/*"])


def test_what_is_not_there_is_told(tmp_path):
  synthetic.write_run(tmp_path / "a", "first", np.ones(3))
  synthetic.write_run(tmp_path / "b", "first", np.ones(3))
  for patterns, message in (
    ([f"{tmp_path}/x*"], "finds no folder of a run"),
    ([f"{tmp_path}/x"], "is not the folder of a run: it has no examples"),
  ):
    with pytest.raises(FileNotFoundError, match=message):
      results_lib.load_runs(patterns)
  with pytest.raises(FileNotFoundError, match="is not the folder of a search"):
    results_lib.load_tunings([str(tmp_path / "a")])
  runs = results_lib.load_runs([f"{tmp_path}/*"])
  assert [r.label for r in runs] == ["first (a)", "first (b)"]
  assert results_lib.find_baseline(runs, "b").label == "first (b)"
  with pytest.raises(
    ValueError, match="=baseline matches none of the runs: give one of first .a., first"
  ):
    results_lib.find_baseline(runs, "baseline")
  with pytest.raises(ValueError, match="--baseline=first matches 2 runs"):
    results_lib.find_baseline(runs, "first")
  (tmp_path / "a" / "summary.json").unlink()
  with pytest.raises(FileNotFoundError, match="not a finished run"):
    results_lib.load_runs([f"{tmp_path}/*"])


def test_few_examples_for_an_output_temperature_are_reported(study):
  runs = results_lib.load_runs([f"{study}/runs/*"])
  baseline = results_lib.find_baseline(runs, "baseline")
  rows = comparisons.likelihood(runs, baseline)
  for count, warns in ((6, True), (80, False)):
    fitted = [
      dataclasses.replace(r, result=dataclasses.replace(r.result, fitted_on={r.task: count}))
      for r in rows
    ]
    text = report_page.likelihood_section(fitted, baseline)
    assert text.count("fitted on 6 examples, fewer than 40") == warns


def test_a_picture_against_cost_draws_every_method_in_every_panel(study):
  runs = results_lib.load_runs([f"{study}/runs/*"])
  baseline = results_lib.find_baseline(runs, "baseline")
  figure = pictures.quality_against_cost(
    comparisons.quality(runs, baseline),
    comparisons.likelihood(runs, baseline),
    comparisons.costs(runs),
    "baseline",
    "wordmath",
  )
  assert [len(axis.containers) for axis in figure.axes] == [4] * 5 + [3] * 5
  assert "side by side, ticks inside mark their costs" in figure.get_suptitle()
  for upper, lower in zip(figure.axes, figure.axes[5:]):
    assert upper.get_xlim() == lower.get_xlim()
  flops = figure.axes[1]
  costs = sorted(c.flops for c in comparisons.costs(runs))
  assert flops.lines[-1].get_xdata() == pytest.approx(costs)  # where the marks are
  for axis in figure.axes:
    assert axis.get_xlabel().endswith(", log scale") == (axis.get_xscale() == "log")
    (low, high), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for container in axis.containers:
      x, y = container.lines[0].get_xydata()[0]
      assert low < x < high and bottom < y < top
  pictures.drawing.plt.close(figure)


@pytest.mark.parametrize("values", [(0.436, 4.95), (2.1, 6.4), (31.4, 253.0), (1.1e8, 8.9e10)])
def test_a_logarithmic_axis_has_round_ticks(values):
  figure, ((axis,),) = drawing.axes(1)
  drawing.value_axis(axis, "x", "cost", values)
  axis.set_xlim(values)
  figure.draw_without_rendering()
  ticks = [t for t in axis.get_xticks() if values[0] <= t <= values[1]]
  assert len(ticks) >= 2
  assert all(f"{t:.0e}" == f"{t:.5e}".replace(".00000", "") for t in ticks), ticks
  assert axis.get_xlabel() == "cost, log scale"
  assert [drawing.short(t) for t in (0.5, 20.0, 2e4, 5e8)] == ["0.5", "20", "20k", "500M"]
  drawing.plt.close(figure)


def test_a_reliability_diagram_has_the_bins_of_the_error(study):
  runs = results_lib.load_runs([f"{study}/runs/*"])
  rows = comparisons.calibrations(runs, results_lib.find_baseline(runs, "baseline"))
  figure = pictures.reliability(rows, "wordmath")
  assert "15 equal-mass bins" in figure.get_suptitle()
  expected = [np.unique(calibration_error.bins(row.events.confidences)).size for row in rows]
  points = [len(c.lines[0].get_xdata()) for axis in figure.axes for c in axis.containers]
  assert points == expected
  pictures.drawing.plt.close(figure)


def test_the_history_has_the_best_so_far_and_the_pruned(tmp_path):
  synthetic.write_tuning(tmp_path / "x")
  (tuning,) = results_lib.load_tunings([str(tmp_path / "x")])
  figure = pictures.history(tuning)
  lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
  assert len(lines["pruned (estimate)"].get_xdata()) == 5
  best = lines["best so far"].get_ydata()
  assert (np.diff(best) <= 0).all()
  assert best[-1] == tuning.profile["objective"]["value"]
  assert set(lines["baseline"].get_ydata()) == {1.2}
  assert len(figure.axes[1].get_lines()[0].get_xdata()) == 8  # the sweep
  pictures.drawing.plt.close(figure)


def test_the_command_line_writes_a_page_and_refuses_in_a_sentence(tmp_path):
  synthetic.write_tuning(tmp_path / "x")

  def call(*flags):
    return programs.call("experiments.report", *flags)

  done = call(f"--tune={tmp_path}/*", f"--output={tmp_path}/out")
  assert done.returncode == 0, done.errors
  assert done.output.strip().splitlines()[-1].startswith(f"Saved {tmp_path}/out/report.md with 2")
  assert (
    f"python -m experiments.report '--tune={tmp_path}/*'"
    in (tmp_path / "out" / "report.md").read_text()
  )
  assert json.loads((tmp_path / "out" / "comparisons.json").read_text()) == []
  refused = call()
  assert refused.returncode == 1
  assert "error: nothing to report: set --runs, --tune or both" in refused.errors


@pytest.mark.parametrize("recorded", [True, False])
def test_costs_with_different_definitions_are_not_put_into_one_table(tmp_path, recorded):
  for name in ("evaluate", "compare"):
    command = {"command": f"python -m experiments.{name} --limit=4"}
    synthetic.write_run(
      tmp_path / name,
      name,
      np.ones(4),
      costs=[{"task": "wordmath", "seed": 0} | ({"measured_by": name} if recorded else {})],
    )
    settings = tmp_path / name / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | command))
  loaded = results_lib.load_runs([str(tmp_path / "*")])
  with pytest.raises(ValueError, match=r"different definitions \(compare, evaluate\)"):
    results_lib.check_comparable(loaded, loaded[0])
  results_lib.check_comparable(loaded[:1], loaded[0])
