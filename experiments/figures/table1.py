"""Table 1: budgets of the searches of τ, and what each of them found.

    python -m experiments.reproduce --figure=table1 --model=olmoe --data_dir=data \\
        --allow_code_execution

The paper's table has samples and trials, members n, the largest τ (T) and the number of
layers kept at 0 at either end (L) for three categories and three models; see
`experiments.tuning.tuning_configs`. This one adds each search's gain on its own examples and
on fresh ones, and its cost.
"""

from experiments.analysis import report_page
from experiments.figures import compared, searches

TITLE = "Budgets of the searches, and what they found"
BACKGROUND = (
  "The paper lists budgets (math 100 samples and 50 trials, commonsense 300 and 100, code 50 "
  "and 50), but not what the searches cost, nor what they gain on other samples."
)
CONFIGS, commands, measure = searches.CONFIGS, searches.commands, searches.measure
findings = searches.findings


def table(records: list[searches.Record]) -> str:
  settings, cost = lambda r: r["settings"], lambda r: r["profile"]["cost"]
  columns = {
    "category": "category",
    "task": "task",
    "objective": lambda r: settings(r)["objective"],
    "samples / trials": lambda r: f"{settings(r)['num_examples']} / {settings(r)['num_trials']}",
    "n": lambda r: settings(r)["num_members"],
    "T": lambda r: f"{settings(r)['max_tau']:g}",
    "L": lambda r: settings(r)["fixed_layers"],
    searches.SEARCHED: lambda r: f"{searches.searched_gain(r):+.2f}",
    searches.FRESH: lambda r: compared.cell(searches.fresh(r), 2, True),
    "pruned": lambda r: cost(r)["pruned"],
    "tokens": lambda r: f"{cost(r)['tokens']:,}",
    "seconds": lambda r: f"{cost(r)['seconds']:.0f}",
  }
  return f"{report_page.table_of(records, columns)}\n\n{searches.NOTE}"


def draw(records: list[searches.Record]):
  return None
