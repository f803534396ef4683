"""Figure 7: histories of the searches of τ, math tasks by perplexity.

    python -m experiments.reproduce --figure=fig7 --model=olmoe --data_dir=data

Trials in their order: one τ for all layers in steps of 0.05 first, then what TPE proposes,
with the best so far and the plain model. The paper gave each task 50 trials on 100 samples
and shows their history; how much of what a search found holds on other samples with other
noise it does not say, which the table here does.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       20 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    20 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     10 minutes
    embedded   ships with the package                  one CPU core           3 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

from experiments.figures import searches
from experiments.figures.work import Command, Work

TITLE = "Searches of τ: math, by perplexity"
SAW = (
  "The paper shows validation perplexity over the trials of its searches (50 trials on "
  "100 samples); not how much of the best one's gain is luck."
)
CONFIGS = searches.CONFIGS


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.math)


def measure(work: Work) -> list[searches.Record]:
  return searches.records(work, work.model.math)


table, findings, draw = searches.table, searches.findings, searches.draw
