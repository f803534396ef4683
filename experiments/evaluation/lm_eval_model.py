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
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from experiments.cli import app
from experiments.evaluation.engine import Answers, Continuation, Engine, Prompt, Request, request_id
from roe_jax import temperature_profiles
from roe_jax.config import ModelConfig
from roe_jax.roster import Roster
from roe_jax.text import tokenizer as tokenizer_lib
from roe_jax.text.chat import Chat, load_template
from roe_jax.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # default of the harness's own models
# Supported sampling settings and their defaults; other settings that may only have no effect.
_SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


class RosterLM(TemplateLM):
  """A model with a roster.

  It makes, and so validates, requests before `engine` is set and parameters are loaded.

  Attributes:
    engine: answers requests.
    max_new_tokens: limit for all generations; None to use each task's.
    requests: requests by label (the name of a task).
    lengths: number of tokens of each scored continuation, by context and text.
    truncated: noise addresses of the contexts that were truncated.
  """

  def __init__(
    self,
    name: str,
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat: Chat | None = None,
    max_new_tokens: int | None = None,
  ):
    """Creates a model of the checkpoint `name`; with `chat`, prompts are rendered chats."""
    super().__init__()
    self.engine: Engine | None = None
    self.max_new_tokens = max_new_tokens
    self.requests: dict[str, list[Request]] = {}
    self.lengths: dict[tuple[str, str], int] = {}
    self.truncated: set[int] = set()
    self._name, self._config, self._tokenizer, self._chat = name, config, tokenizer, chat
    self._label = ""
    self._openings: dict[str, tuple[int, ...]] = {}  # of rendered chats

  @property
  def max_length(self) -> int:
    return self._config.context_length

  @property
  def max_gen_toks(self) -> int:
    return MAX_NEW_TOKENS

  @property
  def eot_token_id(self) -> int:
    ids = tokenizer_lib.stop_tokens(self._tokenizer, self._config)
    if not ids:
      raise ValueError("the model has no end-of-text token, which an empty context needs")
    return ids[0]

  @property
  def prefix_token_id(self) -> int:
    return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    """Tokens that end generation."""
    chat = self._chat.stop_tokens if self._chat else ()
    return tokenizer_lib.stop_tokens(self._tokenizer, self._config, chat)

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
    if self._chat is None:
      self._chat = Chat.load(app.checkpoint_path(self._name), self._tokenizer)
    text = self._chat.render(chat_history)
    self._openings[text] = tuple(self._chat.prompt(chat_history).opening)
    return text

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Returns token ids; adds no BOS token to a chat or a text that starts with one."""
    del kwargs
    if add_special_tokens is None:
      start = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
      add_special_tokens = not (self._chat or has_bos_prefix(string, start))
    return self._tokenizer.encode(string, add_special_tokens)

  # Requests

  def continuation(self, context: str, text: str, end: bool = False) -> Continuation:
    """Makes a request to score `text` after a context, with `end` also a stop token after it."""
    before, tokens = self._encode_pair(context, text)
    return self._continuation(context, before, [*tokens, *self.stop_tokens[: int(end)]])

  def prompt(self, context: str, settings: dict[str, Any], sample: int = 0) -> Prompt:
    """Makes a request to complete a context.

    Args:
      context: the text.
      settings: a harness task's "generation_kwargs".
      sample: index of the sample, for several samples of one context.

    Raises:
      ValueError: a setting is unknown, or leaves no room for the context.
    """
    known = normalize_gen_kwargs(settings, self.max_gen_toks)
    limit = self.max_new_tokens or known.pop("max_gen_toks")
    known.pop("max_gen_toks", None)
    stop, samples = known.pop("until"), known.pop("do_sample")
    sampler = {name: known.pop(name, value) for name, value in _SAMPLING.items()}
    unknown = [k for k, v in known.items() if k not in _NEUTRAL or v != _NEUTRAL[k]]
    if unknown:
      raise ValueError(
        f"unsupported generation settings {', '.join(unknown)}: supported are "
        f"{', '.join(_SAMPLING)}, until and max_gen_toks"
      )
    if limit >= self.max_length:
      raise ValueError(
        f"{limit} new tokens leave no room for a prompt in the model's context of "
        f"{self.max_length}: decrease --max_new_tokens"
      )
    tokens = self._truncate(context, self.tok_encode(context), self.max_length - limit)
    if not tokens:
      tokens = [self.prefix_token_id]
    return Prompt(
      tuple(tokens),
      request_id(context, sample),
      limit,
      tuple(s for s in stop if s),
      tuple(sampler.values()) if samples else (0.0, 0, 1.0),
      self.stop_tokens,
      self._openings.get(context, ()) if self._chat else None,
    )

  def windows(self, text: str) -> list[Continuation]:
    """Makes requests that score each token of a text once, the first after the prefix token."""
    windows = get_rolling_token_windows(
      self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
    )
    return [
      Continuation(tuple(context), tuple(tokens), request_id(text, i))
      for i, (context, tokens) in enumerate(map(make_disjoint_window, windows))
    ]

  def _continuation(self, context, context_tokens, tokens):
    if not tokens:
      raise ValueError(f"the continuation after {context[-40:]!r} has no tokens")
    if len(tokens) > self.max_length:
      raise ValueError(
        f"a continuation of {len(tokens)} tokens exceeds the model's context of {self.max_length}"
      )
    # The last token is predicted only, so it takes no position.
    kept = self._truncate(context, context_tokens, self.max_length + 1 - len(tokens))
    return Continuation(tuple(kept), tuple(tokens), request_id(context))

  def _truncate(self, context, tokens, room):
    if len(tokens) > room:
      self.truncated.add(request_id(context))
    return tokens[-room:]

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encodes a pair as the harness does, or apart if one token would span their border."""
    if not context:
      return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
    before, tokens = super()._encode_pair(context, continuation)
    if not tokens:
      spaces = context[len(context.rstrip()) :]
      tokens = self.tok_encode(spaces + continuation, add_special_tokens=False)
    return before, tokens

  # Methods that the harness calls

  def answers(self, label: str, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Returns the engine's answers, with a progress bar; records the requests under a label."""
    self.requests.setdefault(label, []).extend(requests)
    with tqdm(total=len(set(requests)), desc=label, unit="request", file=sys.stderr) as bar:
      return self.engine.answer(requests, bar.update)

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = True
  ) -> list[tuple[float, bool]]:
    found = []
    for self._label, group in _by_task(requests):
      found += super().loglikelihood(group, disable_tqdm=True)
    return found

  def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
    wanted = [self._continuation(context, *tokens) for (context, _), *tokens in requests]
    self.lengths |= {texts: len(tokens) for texts, _, tokens in requests}
    return [(a["log_prob"], a["is_greedy"]) for a in self.answers(self._label, wanted)]

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = True
  ) -> list[float]:
    found = []
    for label, group in _by_task(requests):
      windows = [self.windows(*r.args) for r in group]
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
        prompts.append(self.prompt(*request.args, sample))
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
      roster, tau = profile.roster | roster, profile.temperatures
    else:
      tau = app.parse_temperatures(str(tau).replace(";", ","))
    made = Roster.create(config, temperatures=tau, seed=seed, **roster)
    tokenizer = app.load_tokenizer(checkpoint)
    super().__init__(checkpoint, config, tokenizer)
    params, config = app.load_params(checkpoint, dtype, mesh)
    if profile:
      profile.check_routers(params)
    settings = {
      "model": temperature_profiles.model_of(checkpoint, config, params),
      "dtype": config.dtype,
      "roster": made.settings(),
    }
    self.engine = Engine(
      params,
      config,
      tokenizer,
      made,
      Answers.of(pathlib.Path(answers), settings) if answers else Answers(),
      batch_size=16 if batch_size == "auto" else int(batch_size),
    )


def _by_task(requests: list[Instance]) -> Iterator[tuple[str, list[Instance]]]:
  for name, group in itertools.groupby(requests, lambda r: r.task_name or "requests"):
    yield name, list(group)
