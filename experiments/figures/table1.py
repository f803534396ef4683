"""Table 1: budgets of the searches of τ, and what each of them found.

    python -m experiments.reproduce --figure=table1 --model=olmoe --data_dir=data \\
        --allow_code_execution

The paper's table has samples and trials, members n, the largest τ (T) and the layers kept
at 0 at either end (L) for three categories and three models; see
`experiments.tuning.tuning_configs`. Here each search also tells what it came to, on its own
samples and on fresh ones, and what it cost.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       65 minutes (searches)
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    75 minutes (searches)
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     45 minutes (searches)
    embedded   ships with the package                  one CPU core           6 minutes (searches)

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

from experiments.analysis import report_page
from experiments.figures import compared, searches
from experiments.figures.work import Command, Work

TITLE = "Budgets of the searches, and what they found"
SAW = (
  "The paper lists budgets (math 100 samples and 50 trials, common sense 300 and 100, "
  "code 50 and 50), not what the searches cost, nor what they are worth on other samples."
)
CONFIGS = searches.CONFIGS


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.tasks)


def measure(work: Work) -> list[searches.Record]:
  return [r | {"trials": []} for r in searches.records(work, work.model.tasks)]


def table(records: list[searches.Record]) -> str:
  rows = []
  for r in records:
    settings, cost = r["settings"], r["profile"]["cost"]
    rows.append(
      [
        r["category"],
        r["task"],
        settings["objective"],
        f"{settings['num_samples']} / {settings['num_trials']}",
        settings["num_members"],
        f"{settings['max_temperature']:g}",
        settings["fixed_layers"],
        f"{searches.searched_gain(r):+.2f}",
        compared.cell(searches.fresh(r), 2, True),
        cost["pruned"],
        f"{cost['tokens']:,}",
        f"{cost['seconds']:.0f}",
      ]
    )
  return (
    report_page.table(
      [
        "category",
        "task",
        "objective",
        "samples / trials",
        "n",
        "T",
        "L",
        "to plain, searched",
        "to plain, fresh",
        "pruned",
        "tokens",
        "s",
      ],
      rows,
    )
    + "\n\n"
    + searches.NOTE
  )


findings = searches.findings


def draw(records: list[searches.Record]):
  return None
