"""Tuning configs by name: the paper's budgets, and small ones to try.

    python -m experiments.tune --config=paper_math_olmoe --checkpoint=olmoe --task=paper/gsm8k \\
        --output=results/tune/olmoe-gsm8k

`paper_CATEGORY_MODEL` is the budget in arXiv 2509.17238 (Table 1) for a category of tasks and
a model. "trials x examples" are per search, and there is one search per task:

    CATEGORY      tasks                                          objective    trials x examples
    math          gsm8k, addsub, svamp, multiarith, singleeq     perplexity          50 x 100
    commonsense   siqa, obqa, hellaswag, arc_easy, arc_challenge accuracy           100 x 300
    code          humaneval, humaneval_plus                      accuracy            50 x 50

    MODEL         n    cache      T: math, commonsense, code     L: math, commonsense, code
    olmoe         32   clean         0.5,  0.5, 0.5                 1, 3, 1
    mixtral       64   standard      0.25, 0.3, 0.25                5, 3, 5
    gpt_oss       64   standard      0.2,  0.2, 0.2                 5, 5, 5

The paper reports gains with the temperature profiles found on nearly all of the twelve tasks,
the largest for OLMoE and none on MultiArith for Mixtral and GPT-OSS, in figures without
intervals. It reports neither the cost of a search nor its gain on fresh validation examples,
which `experiments.tune` adds.

    python -m experiments.tune --config=wordmath --checkpoint=embedded:wordmath_overtrained \\
        --task=wordmath --output=results/tune/wordmath

takes a few minutes on two CPU cores.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """A search; every field is overridden by the flag of `experiments.tune` of that name.

  Attributes:
    objective: a name in `objectives.OBJECTIVES`.
    num_examples: validation examples that trials see.
    num_trials: trials, including the sweep.
    num_members: n.
    max_tau: largest τ; every τ is in [0, max_tau].
    fixed_layers: number of first and of last layers that keep τ = 0.
    cache: of the roster.
    parameter: what is tuned: "tau", or "beta" of SCMoE's contrast, in [0, max_beta].
    max_beta: largest β.
  """

  objective: str = "perplexity"
  num_examples: int = 100
  num_trials: int = 50
  num_members: int = 8
  max_tau: float = 0.5
  fixed_layers: int = 0
  cache: str = "clean"
  parameter: str = "tau"
  max_beta: float = 1.0


_CATEGORIES: dict[str, dict[str, Any]] = {
  "math": dict(objective="perplexity", num_examples=100, num_trials=50),
  "commonsense": dict(objective="accuracy", num_examples=300, num_trials=100),
  "code": dict(objective="accuracy", num_examples=50, num_trials=50),
}
# n, cache, and (T, L) by category.
_MODELS = {
  "olmoe": (32, "clean", {"math": (0.5, 1), "commonsense": (0.5, 3), "code": (0.5, 1)}),
  "mixtral": (64, "standard", {"math": (0.25, 5), "commonsense": (0.3, 3), "code": (0.25, 5)}),
  "gpt_oss": (64, "standard", {"math": (0.2, 5), "commonsense": (0.2, 5), "code": (0.2, 5)}),
}
CONFIGS: dict[str, TuningConfig] = {
  "wordmath": TuningConfig(num_examples=60, num_trials=30),
  # The paper's categories, scaled down for tasks of the embedded models.
  "embedded_math": TuningConfig(num_examples=50, num_trials=24),
  "embedded_commonsense": TuningConfig(objective="accuracy", num_examples=50, num_trials=24),
  "embedded_code": TuningConfig(objective="accuracy", num_examples=50, num_trials=24),
} | {
  f"paper_{category}_{model}": TuningConfig(
    **budget,
    num_members=n,
    cache=cache,
    max_tau=bounds[category][0],
    fixed_layers=bounds[category][1],
  )
  for category, budget in _CATEGORIES.items()
  for model, (n, cache, bounds) in _MODELS.items()
}


def load(name: str | None) -> TuningConfig:
  """Returns the config of that name; the defaults for None.

  Raises:
    ValueError: unknown name.
  """
  if name is None:
    return TuningConfig()
  if name not in CONFIGS:
    raise ValueError(f"unknown tuning config {name!r}: give one of {', '.join(CONFIGS)}")
  return CONFIGS[name]
