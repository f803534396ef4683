"""The models that figures are made of: where they come from, and what they are asked."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Model:
  """A model of the paper, or the embedded ones in its place.

  Attributes:
    name: as --model names it.
    title: as pages name it.
    checkpoints: as --checkpoint names them; the first is the one that all figures are
      made of, and some take the others, too.
    prepare: commands that make the checkpoints; none if they ship with the package.
    hardware: on which figures take the time that their docstrings tell.
    math, commonsense, code: tasks that take the paper's tasks' places in its
      categories; see `experiments.tasks`.
    text: the task whose perplexity stands for the model's (fig. 5).
    tuning: tuning config of a category, with {category}; see
      `experiments.tuning.tuning_configs`.
    num_members: n.
    cache: of the roster.
    temperature: the uniform τ where none is tuned.
    mesh: of devices, as --mesh names it; None: one device.
    chat: of a model that is asked in its chat format, the flags of that; None: plain prompts.
    num_seeds: noise seeds.
    num_examples: test examples of each task; None: all.
    num_validation: validation examples on which output temperatures are fitted.
    num_samples, num_trials: of a search; None: those of the tuning config.
    batch_size: examples done together.
  """

  name: str
  title: str
  checkpoints: tuple[str, ...]
  prepare: tuple[str, ...]
  hardware: str
  math: tuple[str, ...]
  commonsense: tuple[str, ...]
  code: tuple[str, ...]
  text: str
  tuning: str
  num_members: int
  cache: str
  temperature: float
  mesh: str | None = None
  chat: dict[str, str | int] | None = None
  num_seeds: int = 5
  num_examples: int | None = None
  num_validation: int = 100
  num_samples: int | None = None
  num_trials: int | None = None
  batch_size: int = 16

  @property
  def checkpoint(self) -> str:
    return self.checkpoints[0]

  @property
  def tasks(self) -> tuple[str, ...]:
    """Of all categories, in the paper's order."""
    return self.math + self.commonsense + self.code

  def category(self, task: str) -> str:
    """The category of a task; of the text, whose perplexity is tuned, that of math."""
    return next((c for c in CATEGORIES if task in getattr(self, c)), "math")


CATEGORIES = ("math", "commonsense", "code")
_PAPER = dict(
  math=("gsm8k", "addsub", "svamp", "multiarith", "singleeq"),
  commonsense=("siqa", "obqa", "hellaswag", "arc_easy", "arc_challenge"),
  code=("humaneval", "humaneval_plus"),
  text="wikitext103",
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
      temperature=0.2,
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
      temperature=0.1,
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
      temperature=0.1,
      chat=dict(reasoning_effort="low", chat_date="2025-08-05", max_new_tokens=1024),
      mesh="auto",
      **_PAPER,
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
      temperature=0.3,
      num_seeds=2,
      num_examples=100,
      num_validation=60,
    ),
  )
}


def get(name: str) -> Model:
  """The model of that name.

  Raises:
    ValueError: there is none.
  """
  if name not in MODELS:
    raise ValueError(
      f"there is no model {name!r} to make figures of; there are {', '.join(MODELS)}"
    )
  return MODELS[name]
