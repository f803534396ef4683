"""Renders prompts for instruct models from the checkpoint's chat template.

Templates render as in `apply_chat_template` of transformers, which is not required.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import hashlib
import os
import pathlib
from typing import Any

from roe_jax.checkpoint_folder import PathLike
from roe_jax.completion import Completion
from roe_jax.text import answer as answer_lib
from roe_jax.text import template_process
from roe_jax.text import tokenizer as tokenizer_lib
from roe_jax.text.answer import Answer, AnswerReader
from roe_jax.text.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
# Variables that every template gets; any other that it uses is a setting.
_BUILTINS = {"messages", "tools", "documents"}
_BUILTINS |= {"add_generation_prompt", "strftime_now", "raise_exception"}
# Appended to a message's text to find where the rendered message ends.
_MARK = "MARK-OF-THE-END "

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A rendered conversation.

  Attributes:
    tokens: token ids, including special tokens.
    opening: the last of them that belong to the assistant's turn, such as
      <|im_start|>assistant.
  """

  tokens: list[int]
  opening: list[int]


class Chat:
  """A model's chat format.

  Attributes:
    stop_tokens: tokens that end an answer: the tokenizer's `eos_ids` and the template's
      end-of-turn tokens; may be empty.
    settings: everything that prompts depend on other than their messages.
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
    """Creates the chat format of a jinja template; see `load`."""
    try:
      used = template_process.variables(template)
    except template_process.TemplateError as error:
      raise ValueError(f"{name} is not a valid jinja template: {error}") from error
    settings = {key: value for key, value in settings.items() if value is not None}
    known = used - {*_BUILTINS, *tokenizer.named_tokens}
    for key in settings:
      if key not in known:
        raise ValueError(
          f"{name} does not use the setting {key}: leave it out"
          + (f" (it uses {', '.join(sorted(known))})" if known else "")
        )
    if date is not None and "strftime_now" not in used:
      raise ValueError(f"{name} does not use the date: leave it out")
    self._name, self._template = name, template
    self._tokenizer = tokenizer
    self._date = _parse_date(date)
    self._variables = settings
    self.settings = settings | {"template": hashlib.sha256(template.encode()).hexdigest()[:16]}
    if "strftime_now" in used:
      self.settings["date"] = self._date.isoformat()
    self.stop_tokens = self._find_stop_tokens()

  @classmethod
  def load(
    cls, folder: PathLike, tokenizer: Tokenizer, *, date: str | None = None, **settings: Any
  ) -> "Chat":
    """Loads the chat format of a roe_jax checkpoint or a Hugging Face folder.

    Args:
      folder: contains chat_template.jinja, or a tokenizer_config.json or
        chat_template.json with a "chat_template".
      tokenizer: the tokenizer in that folder.
      date: YYYY-MM-DD, for templates that contain the current date; by default today,
        which makes prompts depend on the day.
      **settings: other variables of the template, such as reasoning_effort (GPT-OSS) or
        enable_thinking (Qwen3); None for the template's default.

    Raises:
      ValueError: there is no template, it is invalid, or it does not use a setting.
    """
    folder = pathlib.Path(folder)
    return cls(
      load_template(folder), tokenizer, name=f"the chat template of {folder}", date=date, **settings
    )

  def render(self, messages: Sequence[Message]) -> str:
    """Renders messages as text, up to the start of the answer.

    If the last message is the assistant's, it is the start of the answer.

    Raises:
      ValueError: the messages are malformed, or the template rejects or omits one.
    """
    check_messages(messages)
    if messages[-1]["role"] == "assistant":
      return self._render_open(messages)
    text = self._render(messages, True)
    for message in messages:
      # Templates may omit or rewrite thoughts and tool calls of earlier turns.
      if message["role"] not in ("assistant", "tool") and message["content"].strip() not in text:
        raise ValueError(
          f"{self._name} leaves out messages of the role {message['role']!r}: "
          "put their text into a user message"
        )
    return text

  def prompt(self, messages: Sequence[Message]) -> Prompt:
    """Returns messages as tokens, up to the start of the answer; raises like `render`."""
    text = self.render(messages)
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    try:
      start = len(os.path.commonprefix([text, self._render(before, False)]))  # noqa: RUF071 - of characters
    except ValueError:  # there is no message before the answer
      start = 0
    return Prompt(
      *(self._tokenizer.encode(t, add_special_tokens=False) for t in (text, text[start:]))
    )

  def reader(self, prompt: Prompt) -> AnswerReader:
    """Returns a reader of the answer to a prompt, for streaming."""
    return answer_lib.reader(self._tokenizer, prompt.opening)

  def stop_reader(self, prompts: Sequence[Prompt]) -> Callable[[int], AnswerReader]:
    """Returns the `stop_reader` of `decode.generate`: stop strings end the answers only."""
    return lambda index: answer_lib.reader(
      self._tokenizer, prompts[index].opening, skip_special_tokens=False
    )

  def answer(
    self, prompt: Prompt, completion: Completion, stop_strings: Sequence[str] = ()
  ) -> Answer:
    """Returns the answer in the completion of a prompt; see `roe_jax.text.answer.read`."""
    return answer_lib.read(
      self._tokenizer, completion, opening=prompt.opening, stop_strings=stop_strings
    )

  def _render(self, messages, add_generation_prompt):
    values = {
      "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
      "tools": None,
      "documents": None,
      "add_generation_prompt": add_generation_prompt,
    }
    values = self._tokenizer.named_tokens | self._variables | values
    try:
      return template_process.render(self._template, values, self._date.isoformat())
    except template_process.TemplateError as error:
      roles = ", ".join(str(m["role"]) for m in messages)
      raise ValueError(f"{self._name} refuses messages with the roles {roles}: {error}") from error

  def _render_open(self, messages):
    """Renders messages, cut at the end of the last message's text."""
    *others, last = messages
    text = self._render([*others, {**last, "content": last["content"] + _MARK}], False)
    before, found, _ = text.rpartition(_MARK)
    if found:
      return before
    # The template has stripped whitespace from the text.
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
    """Returns the special token that follows an assistant's message, or None."""
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
  """Returns the chat template in a checkpoint folder.

  Raises:
    ValueError: there is no template, or no default one.
  """
  folder = pathlib.Path(folder)
  if (folder / TEMPLATE_FILE).is_file():
    return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
  for file in ("tokenizer_config.json", "chat_template.json"):
    kinds = {"chat_template": str | list[dict] | None}
    template = tokenizer_lib.read_json(folder / file, kinds).get("chat_template")
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
          f"{folder / file} has chat templates {', '.join(sorted(named))} and none named "
          f"default: write the one to use to {folder / TEMPLATE_FILE}"
        )
      template = named["default"]
    if isinstance(template, str):
      return template
  raise ValueError(
    f'{folder} has no chat template (neither {TEMPLATE_FILE} nor "chat_template" in '
    "tokenizer_config.json): give plain prompts, as for any base model, or add an instruct "
    "model's template"
  )


def check_messages(messages: Any) -> None:
  """Raises a ValueError unless messages are a list of {"role": text, "content": text}."""
  if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
    raise ValueError('messages must be a list of at least one {"role": ..., "content": ...}')
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping) or not all(
      isinstance(message.get(key), str) for key in ("role", "content")
    ):
      raise ValueError(
        f'message {i} must have "role" and "content", both text; got {str(message)[:80]}'
      )


def _parse_date(date: str | None) -> datetime.date:
  """Returns a day, by default today, so that all prompts of a run agree."""
  try:
    return datetime.date.today() if date is None else datetime.date.fromisoformat(date)
  except (TypeError, ValueError) as error:
    raise ValueError(f"the date must be YYYY-MM-DD, got {date!r}") from error
