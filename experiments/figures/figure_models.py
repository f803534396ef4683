"""The models that figures are made of: checkpoints, tasks and budgets."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Model:
  """A model of the paper, or the embedded models in its place.

  Attributes:
    name: as in --model.
    title: as on pages.
    checkpoints: as in --checkpoint; all figures use the first one, some the others, too.
    prepare: commands that make the checkpoints; none if they ship with the package.
    hardware: which `figures`' times refer to.
    math, commonsense, code: tasks of the paper's categories; see `experiments.tasks`.
    text: the task whose perplexity stands for the model's (fig. 5).
    tuning: tuning config, with {category}; see `experiments.tuning.tuning_configs`.
    num_members: n.
    cache: of the roster.
    tau: the uniform τ where none is tuned.
    mesh: of devices, as in --mesh; None: one device.
    chat: flags of the chat format; None: plain prompts.
    num_seeds: noise seeds.
    num_examples: test examples of each task; None: all.
    num_validation: validation examples for fitting output temperatures.
    num_search_examples, num_trials: of a search; None: those of the tuning config.
    batch_size: examples per batch.
  """

  name: str
  title: str
  checkpoints: tuple[str, ...]
  prepare: tuple[str, ...]
  hardware: str
  math: tuple[str, ...] = ()
  commonsense: tuple[str, ...] = ()
  code: tuple[str, ...] = ()
  text: str = ""
  tuning: str = ""
  num_members: int = 8
  cache: str = "clean"
  tau: float = 0.3
  mesh: str | None = None
  chat: dict[str, Any] | None = None
  num_seeds: int = 5
  num_examples: int | None = None
  num_validation: int = 100
  num_search_examples: int | None = None
  num_trials: int | None = None
  batch_size: int = 16

  @property
  def checkpoint(self) -> str:
    return self.checkpoints[0]

  @property
  def tasks(self) -> tuple[str, ...]:
    """The tasks of all categories, in the paper's order."""
    return self.math + self.commonsense + self.code

  def category(self, task: str) -> str:
    """Returns the category of a task; math for `text`, which is tuned by perplexity, too."""
    return next((c for c in CATEGORIES if task in getattr(self, c)), "math")


CATEGORIES = ("math", "commonsense", "code")
_PAPER: dict[str, Any] = dict(
  math=("paper/gsm8k", "paper/addsub", "paper/svamp", "paper/multiarith", "paper/singleeq"),
  commonsense=(
    "paper/siqa",
    "paper/obqa",
    "paper/hellaswag",
    "paper/arc_easy",
    "paper/arc_challenge",
  ),
  code=("paper/humaneval", "paper/humaneval_plus"),
  text="paper/wikitext103",
)

MODELS: dict[str, Model] = {
  model.name: model
  for model in (
    Model(
      name="olmoe",
      title="OLMoE-1B-7B-Instruct",
      checkpoints=("olmoe",),
      prepare=(
        "python -m checkpoints_convert --source=allenai/OLMoE-1B-7B-0924-Instruct --target=olmoe",
      ),
      hardware="one GPU of 80 GB (14 GB of weights in bfloat16)",
      tuning="paper_{category}_olmoe",
      num_members=32,
      cache="clean",
      tau=0.2,
      **_PAPER,
    ),
    Model(
      name="mixtral",
      title="Mixtral-8x7B-Instruct-v0.1",
      checkpoints=("mixtral",),
      prepare=(
        "python -m checkpoints_convert --source=mistralai/Mixtral-8x7B-Instruct-v0.1 "
        "--target=mixtral",
      ),
      hardware="eight GPUs of 80 GB (93 GB of weights in bfloat16; 64 members with a cache each)",
      tuning="paper_{category}_mixtral",
      num_members=64,
      cache="standard",
      tau=0.1,
      mesh="auto",
      **_PAPER,
    ),
    Model(
      name="gpt_oss",
      title="gpt-oss-20b",
      checkpoints=("gpt-oss",),
      prepare=(
        "python -m checkpoints_convert --source=openai/gpt-oss-20b --target=gpt-oss --keep_mxfp4",
      ),
      hardware="four GPUs of 80 GB (13.8 GB of weights in MXFP4; 64 members with a cache each)",
      tuning="paper_{category}_gpt_oss",
      num_members=64,
      cache="standard",
      tau=0.1,
      chat=dict(reasoning_effort="low", chat_date="2025-08-05", max_new_tokens=1024),
      mesh="auto",
      **_PAPER,
    ),
    Model(
      name="smollm2",
      title="SmolLM2-135M-Instruct, carved into experts",
      checkpoints=("smollm2_carved",),
      prepare=(
        "python -m checkpoints_convert --source=SmolLM2-135M-Instruct.Q4_1.gguf "
        "--target=smollm2_carved --carve=S4A8E16 --calibration=calibration.txt",
      ),
      hardware="two CPU cores",
      tuning="paper_{category}_olmoe",
      num_members=8,
      cache="clean",
      tau=0.3,
      num_seeds=1,
      num_examples=1000,
      **_PAPER | dict[str, Any](text="text/wikitext2"),
    ),
    Model(
      name="embedded",
      title="the embedded models",
      checkpoints=("embedded:wordmath_overtrained", "embedded:wordmath_control"),
      prepare=(),
      hardware="two CPU cores",
      math=("wordmath_sums", "wordmath_products", "wordmath_quotients"),
      commonsense=("wordmath_choice",),
      code=("wordmath",),
      text="wordmath",
      tuning="embedded_{category}",
      num_members=8,
      cache="clean",
      tau=0.3,
      num_seeds=2,
      num_examples=100,
      num_validation=60,
    ),
  )
}

# Not language models: their figures train what they need.
NETWORKS = {
  "vision": Model(
    name="vision",
    title="small vision networks",
    checkpoints=(),
    prepare=(),
    hardware="two CPU cores",
  )
}
ALL = MODELS | NETWORKS


def get(name: str) -> Model:
  """Returns the model of that name.

  Raises:
    ValueError: unknown name.
  """
  if name not in ALL:
    raise ValueError(f"unknown model {name!r}: figures are made of {', '.join(ALL)}")
  return ALL[name]


def configs(paper: Any, embedded: Any) -> dict[str, Any]:
  """Returns a figure's settings by model: one for the paper's, one for the embedded models.

  SmolLM2 has the paper's on LAMBADA, since a model of its size solves few word problems.
  """
  task = {"task": "text/lambada"} if hasattr(paper, "task") else {}
  own = {"embedded": embedded, "smollm2": dataclasses.replace(paper, **task)}
  return {name: own.get(name, paper) for name in MODELS}
