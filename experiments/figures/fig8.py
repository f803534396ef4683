"""Figure 8: histories of the searches of τ, commonsense tasks by accuracy.

    python -m experiments.reproduce --figure=fig8 --model=olmoe --data_dir=data

As `fig7`, by the share of right choices (paper: 100 trials on 300 samples). With the
embedded models the choice is among four results of a last step of arithmetic.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       30 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    30 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     20 minutes
    embedded   ships with the package                  one CPU core           2 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

from experiments.figures import searches
from experiments.figures.work import Command, Work

TITLE = "Searches of τ: common sense, by accuracy"
SAW = (
  "The paper shows validation accuracy over the trials of its searches (100 trials on "
  "300 samples); not how much of the best one's gain is luck."
)
CONFIGS = searches.CONFIGS


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.commonsense)


def measure(work: Work) -> list[searches.Record]:
  return searches.records(work, work.model.commonsense)


table, findings, draw = searches.table, searches.findings, searches.draw
