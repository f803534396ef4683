"""Figure 9: histories of the searches of τ, code tasks by accuracy.

    python -m experiments.reproduce --figure=fig9 --model=olmoe --data_dir=data \\
        --allow_code_execution

As `fig7`, by the share of right answers that are written out (paper: pass@1, 50 trials on
50 samples). The embedded models write arithmetic in place of programs.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       15 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    25 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     15 minutes
    embedded   ships with the package                  one CPU core           1 minute

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

from experiments.figures import searches
from experiments.figures.work import Command, Work

TITLE = "Searches of τ: code, by accuracy"
SAW = (
  "The paper shows validation pass@1 over the trials of its searches (50 trials on "
  "50 samples); not how much of the best one's gain is luck."
)
CONFIGS = searches.CONFIGS


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.code)


def measure(work: Work) -> list[searches.Record]:
  return searches.records(work, work.model.code)


table, findings, draw = searches.table, searches.findings, searches.draw
