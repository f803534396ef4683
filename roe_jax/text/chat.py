"""Prompts for instruct models, rendered from the checkpoint's own chat template.

Templates are rendered as `apply_chat_template` of transformers does it, without
needing transformers.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes, sandbox

from roe_jax.checkpoint_folder import PathLike
from roe_jax.completion import Completion
from roe_jax.text import answer as answer_lib
from roe_jax.text import tokenizer as tokenizer_lib
from roe_jax.text.answer import Answer, AnswerReader
from roe_jax.text.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
# What every template is given; all else that it asks for is a setting.
_GIVEN = (
  "messages",
  "tools",
  "documents",
  "add_generation_prompt",
  "strftime_now",
  "raise_exception",
)
# Stands for a message's text, to find where a template puts its end.
_MARK = "MARK-OF-THE-END "

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Messages as a model reads them.

  Attributes:
    tokens: token ids, special ones included.
    opening: those of them that belong to the answer's turn already, such as
      <|im_start|>assistant.
  """

  tokens: list[int]
  opening: list[int]


class Chat:
  """How a model is talked to.

  Attributes:
    stop_tokens: the tokens that end an answer: the tokenizer's `eos_ids`, and
      those that end a turn in the template; may be empty.
    settings: what prompts depend on besides their messages.
  """

  def __init__(
    self,
    template: str,
    tokenizer: Tokenizer,
    *,
    name: str = "the chat template",
    date: str | None = None,
    **settings: Any,
  ):
    """Chats with the jinja template `template`; see `load`."""
    environment = _environment()
    try:
      self._template = environment.from_string(template)
      used = meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(
        f"{name} is not a valid jinja template: line {error.lineno}: {error.message}"
      ) from error
    settings = {key: value for key, value in settings.items() if value is not None}
    known = used - {*_GIVEN, *tokenizer.named_tokens}
    for key in settings:
      if key not in known:
        raise ValueError(
          f"{name} does not use the setting {key}: leave it out"
          + (f" (it uses {', '.join(sorted(known))})" if known else "")
        )
    if date is not None and "strftime_now" not in used:
      raise ValueError(f"{name} does not use the date: leave it out")
    self._name = name
    self._tokenizer = tokenizer
    self._date = _parse_date(date)
    self._variables = settings
    self.settings = settings | {"template": hashlib.sha256(template.encode()).hexdigest()[:16]}
    if "strftime_now" in used:
      self.settings["date"] = self._date.date().isoformat()
    self.stop_tokens = self._find_stop_tokens()

  @classmethod
  def load(
    cls, folder: PathLike, tokenizer: Tokenizer, *, date: str | None = None, **settings: Any
  ) -> "Chat":
    """The chat format of a roe_jax checkpoint or of a Hugging Face folder.

    Args:
      folder: holds chat_template.jinja, or a tokenizer_config.json or
        chat_template.json with a "chat_template".
      tokenizer: the one in that folder.
      date: YYYY-MM-DD, for templates that tell the model which day it is; today
        by default, and then prompts depend on the day.
      **settings: what else the template uses, such as reasoning_effort (GPT-OSS)
        or enable_thinking (Qwen3); None is the template's default.

    Raises:
      ValueError: there is no template, it is not valid, or it does not use a
        setting.
    """
    folder = pathlib.Path(folder)
    return cls(
      load_template(folder), tokenizer, name=f"the chat template of {folder}", date=date, **settings
    )

  def render(self, messages: Sequence[Message]) -> str:
    """Messages as text, up to where the answer begins.

    If the last message is the assistant's, it is the beginning of the answer.

    Raises:
      ValueError: the messages are malformed, or the template refuses them or
        leaves one out.
    """
    check_messages(messages)
    if messages[-1]["role"] == "assistant":
      return self._render_open(messages)
    text = self._render(messages, True)
    for message in messages:
      # Thoughts and calls in other turns may be left out or written differently.
      if message["role"] not in ("assistant", "tool") and message["content"].strip() not in text:
        raise ValueError(
          f"{self._name} leaves out messages of the role {message['role']!r}: "
          "put their text into a user message"
        )
    return text

  def prompt(self, messages: Sequence[Message]) -> Prompt:
    """Messages as tokens, up to where the answer begins; raises as `render` does."""
    text = self.render(messages)
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    try:
      start = len(os.path.commonprefix([text, self._render(before, False)]))  # noqa: RUF071 - of characters
    except ValueError:  # nothing comes before an answer without a question
      start = 0
    return Prompt(
      *(self._tokenizer.encode(t, add_special_tokens=False) for t in (text, text[start:]))
    )

  def reader(self, prompt: Prompt) -> AnswerReader:
    """Reads the answer to a prompt while it comes."""
    return answer_lib.reader(self._tokenizer, prompt.opening)

  def answer(
    self, prompt: Prompt, completion: Completion, stop_strings: Sequence[str] = ()
  ) -> Answer:
    """The answer in the completion of a prompt; see `roe_jax.text.answer.read`."""
    return answer_lib.read(
      self._tokenizer, completion, opening=prompt.opening, stop_strings=stop_strings
    )

  def _render(self, messages, add_generation_prompt):
    values = {
      "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
      "tools": None,
      "documents": None,
      "add_generation_prompt": add_generation_prompt,
      "strftime_now": lambda form: self._date.strftime(form),
    }
    try:
      return self._template.render({**self._tokenizer.named_tokens, **self._variables, **values})
    except Exception as error:  # a template is foreign code, and may fail in any way
      roles = ", ".join(str(m["role"]) for m in messages)
      raise ValueError(
        f"{self._name} refuses messages with the roles {roles}: " + " ".join(str(error).split())
      ) from error

  def _render_open(self, messages):
    """Messages as text, cut at the end of the last one's."""
    *others, last = messages
    text = self._render([*others, {**last, "content": last["content"] + _MARK}], False)
    before, found, _ = text.rpartition(_MARK)
    if found:
      return before
    # The template has cut off white space at the end of the text.
    before, found, _ = text.rpartition(_MARK.strip())
    if not found:
      raise ValueError(
        f"{self._name} leaves out the assistant's last message: end with a user's message"
      )
    return before.rstrip()

  def _find_stop_tokens(self):
    ids = list(self._tokenizer.eos_ids)
    if answer_lib.is_harmony(self._tokenizer):
      ends = [self._tokenizer.added_id(mark) for mark in answer_lib.HARMONY_ENDS]
    else:
      ends = [self._end_of_turn()]
    return tuple(ids + [i for i in ends if i is not None and i not in ids])

  def _end_of_turn(self):
    """The special token that follows an assistant's message, or None."""
    try:
      text = self._render(
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK.strip()}],
        False,
      )
    except ValueError:
      return None
    _, found, rest = text.rpartition(_MARK.strip())
    ids = self._tokenizer.encode(rest.lstrip(), add_special_tokens=False) if found else []
    return ids[0] if ids and self._tokenizer.is_special(ids[0]) else None


def load_template(folder: PathLike) -> str:
  """The chat template in a checkpoint folder.

  Raises:
    ValueError: there is none, or none that is the default.
  """
  folder = pathlib.Path(folder)
  if (folder / TEMPLATE_FILE).is_file():
    return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
  for file in ("tokenizer_config.json", "chat_template.json"):
    template = tokenizer_lib.read_json(folder / file).get("chat_template")
    if isinstance(template, list):
      try:
        named = {entry["name"]: entry["template"] for entry in template}
      except (KeyError, TypeError) as error:
        raise ValueError(
          f'"chat_template" in {folder / file} must be text or a list of objects '
          'with "name" and "template"'
        ) from error
      if "default" not in named:
        raise ValueError(
          f"{folder / file} has the chat templates {', '.join(sorted(named))} and "
          f"none named default: write the one to use to {folder / TEMPLATE_FILE}"
        )
      template = named["default"]
    if isinstance(template, str):
      return template
  raise ValueError(
    f'{folder} has no chat template, neither {TEMPLATE_FILE} nor "chat_template" in '
    "tokenizer_config.json: give plain prompts, as for any base model, or put an instruct "
    "model's template there"
  )


def check_messages(messages: Any) -> None:
  """Checks the form of messages.

  Raises:
    ValueError: they are not a list of {"role": text, "content": text}.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
    raise ValueError('messages must be a list of at least one {"role": ..., "content": ...}')
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping) or not all(
      isinstance(message.get(key), str) for key in ("role", "content")
    ):
      raise ValueError(
        f'message {i} must have "role" and "content", both text; got {str(message)[:80]}'
      )


class _GenerationBlocks(ext.Extension):
  """{% generation %} blocks, which tell training what to learn: here, their content."""

  tags = frozenset({"generation"})

  def parse(self, parser):
    line = next(parser.stream).lineno
    return nodes.Scope(
      parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
    )


def _environment() -> jinja2.Environment:
  """Where templates run: they come from downloads, so in a sandbox."""
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, ext.loopcontrols]
  )
  environment.globals["raise_exception"] = _raise_exception
  environment.filters["tojson"] = _to_json
  return environment


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # Jinja's own filter escapes for HTML.
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _parse_date(date: str | None) -> datetime.datetime:
  """Midnight of a day, today's by default, so that all prompts of a run agree."""
  try:
    day = datetime.date.today() if date is None else datetime.date.fromisoformat(date)
  except (TypeError, ValueError) as error:
    raise ValueError(f"the date must be YYYY-MM-DD, got {date!r}") from error
  return datetime.datetime.combine(day, datetime.time())
