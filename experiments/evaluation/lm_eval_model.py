"""A roster as a model of lm-evaluation-harness.

`experiments.evaluate` uses it, and the harness's own program can:

  python -m experiments.harness run --model roe_jax --tasks arc_easy \\
      --model_args checkpoint=olmoe,num_members=8,temperatures=0.3

Anything that imports this module has the model "roe_jax". Its arguments are
`RegisteredRosterLM`'s.

As the harness's own models do, a request that is longer than the model's context is
cut on the left, and the text before a continuation is split from it so that white
space belongs to the continuation.
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

from experiments.cli import app, temperature_profiles
from experiments.evaluation.engine import Answers, Continuation, Engine, Prompt, Request, request_id
from roe_jax.config import ModelConfig
from roe_jax.roster import Roster
from roe_jax.text import tokenizer as tokenizer_lib
from roe_jax.text.chat import Chat, load_template
from roe_jax.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness's own models
# How tokens are chosen, and what says that nothing is changed about it.
_SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


class RosterLM(TemplateLM):
  """A tokenizer and, once there is an engine, a model with a roster.

  Requests can be made before parameters are read, and so be checked.

  Attributes:
    engine: answers requests.
    max_new_tokens: of every generation, whatever a task says; None: what it says.
    requests: those made under each label: the name of a task.
    lengths: tokens of each continuation scored, by context and text.
    truncated: addresses of the contexts that were cut on the left.
  """

  def __init__(
    self,
    name: str,
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat: Chat | None = None,
    max_new_tokens: int | None = None,
  ):
    """A model called `name`; of a chat, prompts are what its template makes of messages."""
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
      raise ValueError("the model names no end-of-text token, which stands for an empty context")
    return ids[0]

  @property
  def prefix_token_id(self) -> int:
    return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    """Tokens that end a generated text."""
    chat = self._chat.stop_tokens if self._chat else ()
    return chat or tokenizer_lib.stop_tokens(self._tokenizer, self._config)

  @property
  def tokenizer_name(self) -> str:
    return self._name

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    return load_template(app.checkpoint_path(self._name)) if chat_template else None

  def apply_chat_template(
    self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Messages as the model reads them; an assistant's last message is left open."""
    del add_generation_prompt  # it says whether the last message is the assistant's
    if self._chat is None:
      self._chat = Chat.load(app.checkpoint_path(self._name), self._tokenizer)
    text = self._chat.render(chat_history)
    self._openings[text] = tuple(self._chat.prompt(chat_history).opening)
    return text

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Token ids; a text that begins with its BOS token, as chats do, gets no other."""
    del kwargs
    if add_special_tokens is None:
      start = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
      add_special_tokens = not (self._chat or has_bos_prefix(string, start))
    return self._tokenizer.encode(string, add_special_tokens)

  # Requests

  def continuation(self, context: str, text: str, end: bool = False) -> Continuation:
    """A request to score a text after a context, and a stop token behind it if asked."""
    before, tokens = self._encode_pair(context, text)
    return self._continuation(context, before, [*tokens, *self.stop_tokens[: int(end)]])

  def prompt(self, context: str, settings: dict[str, Any], sample: int = 0) -> Prompt:
    """A request to continue a context.

    Args:
      context: the text.
      settings: as tasks of the harness have them under "generation_kwargs".
      sample: tells several samples of one context apart.

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
        f"a task asks for the generation settings {', '.join(unknown)}, which are "
        f"not known here; there are {', '.join(_SAMPLING)}, until and max_gen_toks"
      )
    if limit >= self.max_length:
      raise ValueError(
        f"{limit} new tokens leave no room for a prompt in the model's context of "
        f"{self.max_length}: give a smaller --max_new_tokens"
      )
    tokens = self._cut(context, self.tok_encode(context), self.max_length - limit)
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
    """Requests that score a text of any length, each token once, the first after the prefix."""
    windows = get_rolling_token_windows(
      self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
    )
    return [
      Continuation(tuple(context), tuple(tokens), request_id(text, i))
      for i, (context, tokens) in enumerate(map(make_disjoint_window, windows))
    ]

  def _continuation(self, context, context_tokens, tokens):
    if not tokens:
      raise ValueError(f"a continuation has no tokens of its own after {context[-40:]!r}")
    if len(tokens) > self.max_length:
      raise ValueError(
        f"a continuation of {len(tokens)} tokens is longer than the model's context "
        f"of {self.max_length}"
      )
    # The last token is only predicted, and needs no room.
    kept = self._cut(context, context_tokens, self.max_length + 1 - len(tokens))
    return Continuation(tuple(kept), tuple(tokens), request_id(context))

  def _cut(self, context, tokens, room):
    if len(tokens) > room:
      self.truncated.add(request_id(context))
    return tokens[-room:]

  # What the harness asks for

  def answers(self, label: str, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """The engine's answers, with a progress bar, and counted under a label."""
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
      samples: dict[int, int] = {}  # a request that is repeated is the same object
      prompts = []
      for request in group:
        sample = samples[id(request)] = samples.get(id(request), -1) + 1
        prompts.append(self.prompt(*request.args, sample))
      found += [a["text"] for a in self.answers(label, prompts)]
    return found


@register_model("roe_jax")
class RegisteredRosterLM(RosterLM):
  """The model of a checkpoint, for the harness's own program."""

  def __init__(
    self,
    checkpoint: str,
    temperatures: float | str = 0.0,
    seed: int = 0,
    dtype: str | None = None,
    mesh: str | None = None,
    batch_size: int | str = 16,
    answers: str | None = None,
    device: str | None = None,
    max_batch_size: int | None = None,
    **roster: Any,
  ):
    """Reads a checkpoint.

    Args:
      checkpoint: a folder, or an embedded model.
      temperatures: τ of all layers, of each separated by semicolons, or the path of a
        temperature profile.
      seed: of the routing noise and of sampling.
      dtype, mesh: as the flags of the programs here.
      batch_size: requests computed together ("auto" is the default).
      answers: a folder where answers are kept; they are lost without.
      device, max_batch_size: what the harness passes to every model; not used.
      **roster: other settings of `Roster.create`: num_members, cache, ...

    Raises:
      ValueError: a setting is unknown or out of its range, or the profile is another
        model's.
    """
    del device, max_batch_size
    config = app.load_config(checkpoint)
    unknown = roster.keys() - set(temperature_profiles.ROSTER_SETTINGS)
    if unknown:
      raise ValueError(
        f"unknown model_args {', '.join(sorted(unknown))}; the roster's settings "
        f"are temperatures, seed, {', '.join(temperature_profiles.ROSTER_SETTINGS)}"
      )
    path = pathlib.Path(str(temperatures))
    profile = temperature_profiles.read(path) if path.is_file() else None
    if profile:
      profile.check_sizes(config)
      roster, temperatures = profile.roster | roster, profile.temperatures
    else:
      temperatures = app.parse_temperatures(str(temperatures).replace(";", ","))
    made = Roster.create(config, temperatures=temperatures, seed=seed, **roster)
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
