"""A roster as a model of lm-evaluation-harness, registered as "roe_jax".

`experiments.evaluate` and `experiments.harness` use it; `RegisteredRosterLM` documents its
model_args. As in the harness's own models, requests longer than the model's context are
truncated on the left, and whitespace between a context and its continuation belongs to the
continuation.
"""

from collections.abc import Iterator, Sequence
import itertools
import pathlib
import sys
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from experiments.cli import app
from experiments.evaluation.answers import Answers
from experiments.evaluation.engine import Engine
from experiments.evaluation.requests import GREEDY, Prompt, Request, RequestBuilder, choices_address
from roe_jax import temperature_profiles
from roe_jax.roster import Roster
from roe_jax.text.chat import Chat, load_template

MAX_NEW_TOKENS = 256  # default of the harness's own models
# Supported sampling settings and their defaults; other settings that may only have no effect.
_SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


class RosterLM(TemplateLM):
  """A model with a roster.

  It makes, and so validates, requests before `engine` is set and parameters are loaded.

  Attributes:
    builder: makes the requests.
    engine: answers them.
    saved: their answers.
    requests: requests by label (the name of a task).
    lengths: number of tokens of each scored continuation, by context and text.
  """

  engine: Engine

  def __init__(self, name: str, builder: RequestBuilder):
    """Creates a model of the checkpoint `name`."""
    super().__init__()
    self.builder = builder
    self.saved = Answers()
    self.requests: dict[str, list[Request]] = {}
    self.lengths: dict[tuple[str, str], int] = {}
    self._name, self._label = name, ""
    self._addresses: dict[tuple[str, str], str] = {}

  @property
  def max_gen_toks(self) -> int:
    return MAX_NEW_TOKENS

  @property
  def eot_token_id(self) -> int:
    return self.builder.end_token

  @property
  def prefix_token_id(self) -> int:
    return self.builder.prefix_token

  @property
  def tokenizer_name(self) -> str:
    return self._name

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    return load_template(app.checkpoint_path(self._name)) if chat_template else None

  def apply_chat_template(
    self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Renders messages; a final assistant message stays open."""
    del add_generation_prompt  # only says whether the last message is the assistant's
    if not self.builder.settings["chat"]:
      self.builder.use_chat(Chat.load(app.checkpoint_path(self._name), self.builder.tokenizer))
    return self.builder.render(chat_history)

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    del kwargs
    return self.builder.encode(string, add_special_tokens)

  def prompt(self, context: str, settings: dict[str, Any], sample: int = 0) -> Prompt:
    """Makes a request to complete a context.

    Args:
      context: the text.
      settings: a harness task's "generation_kwargs".
      sample: index of the sample, for several samples of one context.

    Raises:
      ValueError: a setting is unknown, or leaves no room for the context.
    """
    known: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
    limit, stop, samples = (known.pop(name) for name in ("max_gen_toks", "until", "do_sample"))
    sampler = {name: known.pop(name, value) for name, value in _SAMPLING.items()}
    unknown = [k for k, v in known.items() if k not in _NEUTRAL or v != _NEUTRAL[k]]
    if unknown:
      raise ValueError(
        f"unsupported generation settings {', '.join(unknown)}: supported are "
        f"{', '.join(_SAMPLING)}, until and max_gen_toks"
      )
    of_sampler = tuple(sampler.values()) if samples else GREEDY
    return self.builder.prompt(context, limit, stop, of_sampler, sample, reserve=True)

  # Methods that the harness calls

  def answers(self, label: str, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Returns the engine's answers, with a progress bar; records the requests under a label."""
    self.requests.setdefault(label, []).extend(requests)
    with tqdm(total=len(set(requests)), desc=label, unit="request", file=sys.stderr) as bar:
      return self.saved.complete(self.engine, requests, bar.update)

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    return self.builder.encode_pair(context, continuation)

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = True
  ) -> list[tuple[float, bool]]:
    found = []
    for self._label, group in _by_task(requests):
      without: dict[Any, list[str]] = {}  # choices of the documents without a context
      for r in group:
        context, *choice = r.args
        if not context:
          without.setdefault(r.doc_id, []).extend(choice)
      self._addresses = {
        ("", text): choices_address(texts) for texts in without.values() for text in texts
      }
      found += super().loglikelihood(group, disable_tqdm=True)
    return found

  def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
    wanted = [
      self.builder.of_tokens(self._addresses.get(texts, texts[0]), *tokens)
      for texts, *tokens in requests
    ]
    self.lengths |= {texts: len(tokens) for texts, _, tokens in requests}
    return [(a["log_prob"], a["is_greedy"]) for a in self.answers(self._label, wanted)]

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = True
  ) -> list[float]:
    found = []
    for label, group in _by_task(requests):
      windows = [self.builder.windows(*r.args) for r in group]
      answers = iter(self.answers(label, list(itertools.chain(*windows))))
      found += [sum(next(answers)["log_prob"] for _ in some) for some in windows]
    return found

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
    found = []
    for label, group in _by_task(requests):
      samples: dict[int, int] = {}  # the harness repeats a request as the same object
      prompts = []
      for request in group:
        sample = samples[id(request)] = samples.get(id(request), -1) + 1
        prompts.append(self.prompt(*request.args, sample=sample))
      found += [a["text"] for a in self.answers(label, prompts)]
    return found


@register_model("roe_jax")
class RegisteredRosterLM(RosterLM):
  """The model "roe_jax" of lm-evaluation-harness."""

  def __init__(
    self,
    checkpoint: str,
    tau: float | str = 0.0,
    seed: int = 0,
    dtype: str | None = None,
    mesh: str | None = None,
    batch_size: int | str = 16,
    answers: str | None = None,
    device: str | None = None,
    max_batch_size: int | None = None,
    **roster: Any,
  ):
    """Loads a checkpoint.

    Args:
      checkpoint: a folder, or an embedded model.
      tau: τ of all layers, or of each layer separated by semicolons, or the path of a
        temperature profile.
      seed: seed for routing noise and sampling.
      dtype, mesh: see the flags of `experiments.evaluate`.
      batch_size: number of requests per batch; "auto" for the default.
      answers: folder to save answers in; None to save none.
      device, max_batch_size: passed by the harness; unused.
      **roster: other settings of `Roster.create`: num_members, cache, ...

    Raises:
      ValueError: a setting is unknown or out of range, or the profile is for another model.
    """
    del device, max_batch_size
    config = app.load_config(checkpoint)
    unknown = roster.keys() - set(temperature_profiles.ROSTER_SETTINGS)
    if unknown:
      raise ValueError(
        f"unknown model_args {', '.join(sorted(unknown))}: the roster's settings "
        f"are tau, seed, {', '.join(temperature_profiles.ROSTER_SETTINGS)}"
      )
    path = pathlib.Path(str(tau))
    profile = temperature_profiles.read(path) if path.is_file() else None
    if profile:
      profile.check_sizes(config)
      roster, temperatures = profile.roster | roster, profile.temperatures
    else:
      temperatures = app.parse_temperatures(str(tau).replace(";", ","))
    made = Roster.create(config, temperatures=temperatures, seed=seed, **roster)
    tokenizer = app.load_tokenizer(checkpoint)
    super().__init__(checkpoint, RequestBuilder(config, tokenizer))
    params, config = app.load_params(checkpoint, dtype, mesh)
    if profile:
      profile.check_routers(params)
    settings = {
      "model": temperature_profiles.model_of(checkpoint, config, params),
      "dtype": config.dtype,
      "roster": made.settings(),
    }
    if answers:
      self.saved = Answers.of(pathlib.Path(answers), settings)
    size = 16 if batch_size == "auto" else int(batch_size)
    self.engine = Engine(params, config, tokenizer, made, size)


def _by_task(requests: list[Instance]) -> Iterator[tuple[str, list[Instance]]]:
  for name, group in itertools.groupby(requests, lambda r: r.task_name or "requests"):
    yield name, list(group)
