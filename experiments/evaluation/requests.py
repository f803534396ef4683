"""Turns task examples and texts into requests: what a model is asked, and at which noise.

A request scores a continuation or completes a prompt. Its noise is addressed by the text of its
context (`request_id`), independent of program, task, index, batch and number of examples: all
choices of a question, and its reference, see the same roster as a generation. Texts are cut into
tokens by the rules of lm-evaluation-harness.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import hashlib
import itertools
import sys
from typing import Any

from experiments.cli import text_files
from experiments.tasks.base import Example, Task
from roe_jax.config import ModelConfig
from roe_jax.text import tokenizer as tokenizer_lib
from roe_jax.text.chat import Chat
from roe_jax.text.tokenizer import Tokenizer

GREEDY = (0.0, 0, 1.0)


def request_id(context: str, sample: int = 0) -> int:
  """Returns the noise address of a context: 32 bits of a hash of its text.

  Among ten thousand contexts, two share an address with a probability of 1 %; they then share
  noise at equal positions, without further effect.

  Args:
    context: the text before what the model predicts.
    sample: index that distinguishes samples of one context, or windows of one text.
  """
  digest = hashlib.blake2b(f"{sample}\n{context}".encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


def choices_address(choices: Sequence[str]) -> str:
  """Returns the text that addresses the noise of choices without a context, the same for all."""
  return "\n".join(choices)


@dataclasses.dataclass(frozen=True)
class Continuation:
  """A request to score tokens after a context.

  Attributes:
    context: token ids, at least one.
    tokens: token ids, at least one.
    request_id: its noise address.
  """

  context: tuple[int, ...]
  tokens: tuple[int, ...]
  request_id: int

  @property
  def sequence(self) -> tuple[int, ...]:
    """Token ids of the context and the continuation."""
    return self.context + self.tokens

  @property
  def max_length(self) -> int:
    """Tokens of the sequence."""
    return len(self.context) + len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A request to complete a prompt.

  Attributes:
    tokens: token ids, at least one.
    request_id: its noise address.
    max_new_tokens: maximum number of generated tokens.
    stop: strings that end generation.
    sampler: temperature, top_k and top_p; see `Sampler.create`.
    stop_tokens: tokens that end generation.
    opening: for a chat, the prompt's tokens that start the answer (see `chat.Prompt`); None
      if all generated text is the answer.
  """

  tokens: tuple[int, ...]
  request_id: int
  max_new_tokens: int
  stop: tuple[str, ...] = ()
  sampler: tuple[float, int, float] = GREEDY
  stop_tokens: tuple[int, ...] = ()
  opening: tuple[int, ...] | None = None

  @property
  def max_length(self) -> int:
    """Most tokens that the sequence can have."""
    return len(self.tokens) + self.max_new_tokens


Request = Continuation | Prompt


def key(request: Request) -> str:
  """Returns a hash of everything that the request's answer depends on, apart from the model."""
  fields = [type(request).__name__, *dataclasses.astuple(request)]
  return hashlib.sha256(text_files.to_json(fields).encode()).hexdigest()[:32]


class RequestBuilder:
  """Makes requests to one model.

  Contexts that do not fit the model's context are truncated on the left.

  Attributes:
    tokenizer: the model's tokenizer.
    max_new_tokens: limit of all generations; None to use that of each example.
    truncated: noise addresses of the contexts that were truncated.
  """

  def __init__(
    self,
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat: Chat | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
  ):
    """Creates a builder.

    Args:
      config: the model's config.
      tokenizer: its tokenizer.
      chat: the chat format of all prompts; None for raw prompts.
      system: system message at the start of each chat.
      max_new_tokens: see the class.
    """
    self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
    self.truncated: set[int] = set()
    self._config, self._chat, self._system = config, chat, system
    self._openings: dict[str, tuple[int, ...]] = {}  # of rendered chats

  @property
  def settings(self) -> dict[str, Any]:
    """What requests depend on besides the examples: "chat" (None for raw prompts) and "system"."""
    return {"chat": self._chat.settings if self._chat else None, "system": self._system}

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    """Tokens that end generation."""
    chat = self._chat.stop_tokens if self._chat else ()
    return tokenizer_lib.stop_tokens(self.tokenizer, self._config, chat)

  @property
  def end_token(self) -> int:
    """The end-of-text token.

    Raises:
      ValueError: there is none.
    """
    ids = tokenizer_lib.stop_tokens(self.tokenizer, self._config)
    if not ids:
      raise ValueError("the model has no end-of-text token, which an empty context needs")
    return ids[0]

  @property
  def prefix_token(self) -> int:
    """The token in place of an empty context; raises as `end_token`."""
    return self.end_token if self.tokenizer.bos_id is None else self.tokenizer.bos_id

  def encode(self, text: str, special: bool | None = None) -> list[int]:
    """Returns token ids; by default without a BOS token for chats and texts that start with it."""
    if special is None:
      bos = self.tokenizer.bos_id
      start = "" if bos is None else self.tokenizer.decode([bos], skip_special_tokens=False)
      special = not (self._chat or (start and text.startswith(start)))
    return self.tokenizer.encode(text, special)

  def use_chat(self, chat: Chat) -> None:
    """Changes to a chat format."""
    self._chat = chat

  def render(self, messages: Sequence[dict[str, str]]) -> str:
    """Renders the messages of a chat; a final assistant message stays open."""
    assert self._chat  # see `use_chat`
    text = self._chat.render(messages)
    self._openings[text] = tuple(self._chat.prompt(messages).opening)
    return text

  def context(self, example: Example) -> str:
    """Returns the text of an example's prompt.

    Raises:
      ValueError: the chat template rejects its messages.
    """
    if self._chat is None:
      return example.prompt
    system = [{"role": "system", "content": self._system}] if self._system else []
    return self.render([*system, *example.messages])

  def continuation(
    self, context: str, text: str, end: bool = False, instead: str | None = None
  ) -> Continuation:
    """Makes a request to score `text` after a context.

    Args:
      context: the text before it.
      text: what is scored.
      end: whether also a stop token after it is.
      instead: text that addresses the noise in place of an empty context, which all questions
        without one share; by default `text`.

    Raises:
      ValueError: the text has no tokens, or more than the model's context.
    """
    before, tokens = self.encode_pair(context, text)
    address = context or instead or text
    return self.of_tokens(address, before, [*tokens, *self.stop_tokens[: int(end)]])

  def of_tokens(self, context: str, before: Sequence[int], tokens: Sequence[int]) -> Continuation:
    """Makes the request of `continuation` for a context in tokens, `before`.

    `context` is the text that addresses the noise.
    """
    if not tokens:
      raise ValueError(f"the continuation after {context[-40:]!r} has no tokens")
    room = self._config.context_length
    if len(tokens) > room:
      raise ValueError(
        f"a continuation of {len(tokens)} tokens exceeds the model's context of {room}"
      )
    # The last token is predicted only, so it takes no position.
    kept = self._truncate(context, before, room + 1 - len(tokens))
    return Continuation(tuple(kept), tuple(tokens), request_id(context))

  def prompt(
    self,
    context: str,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampler: tuple[float, int, float] = GREEDY,
    sample: int = 0,
    reserve: bool = False,
  ) -> Prompt:
    """Makes a request to complete a context.

    Generation ends at the end of the model's context at the latest.

    Args:
      context: the text.
      max_new_tokens: limit, unless the builder has one.
      stop: strings that end generation.
      sampler: temperature, top_k and top_p.
      sample: index of the sample, for several samples of one context.
      reserve: whether to truncate the context so that all new tokens fit, as
        lm-evaluation-harness does, and not only the first.

    Raises:
      ValueError: the reserved tokens leave no room for the context.
    """
    limit, room = self.max_new_tokens or max_new_tokens, self._config.context_length
    if reserve and limit >= room:
      raise ValueError(
        f"{limit} new tokens leave no room for a prompt in the model's context of {room}: decrease "
        "--max_new_tokens"
      )
    tokens = self._truncate(context, self.encode(context), room - (limit if reserve else 1))
    return Prompt(
      tuple(tokens) or (self.prefix_token,),
      request_id(context, sample),
      limit,
      tuple(s for s in stop if s),
      sampler,
      self.stop_tokens,
      self._openings.get(context, ()) if self._chat else None,
    )

  def windows(self, text: str) -> list[Continuation]:
    """Makes requests that score each token of a text once, the first after the prefix token.

    Windows end where the next begins, and have as much context as fits (the "rolling" likelihoods
    of lm-evaluation-harness).
    """
    tokens, room = self.encode(text), self._config.context_length
    made = []
    for i, first in enumerate(range(0, len(tokens), room)):
      part = tokens[first : first + room]
      start = first + len(part) - room - 1
      context = tokens[max(0, start) : first] if first else [self.prefix_token]
      made.append(Continuation(tuple(context), tuple(part), request_id(text, i)))
    return made

  def encode_pair(self, context: str, text: str) -> tuple[list[int], list[int]]:
    """Encodes a context and its continuation by the rule of lm-evaluation-harness.

    Spaces at the end of the context belong to the continuation, whose tokens are those of both
    together after as many as the context has. If one token would span their border, so that none
    is left, the continuation is encoded apart. An empty context is the prefix token.
    """
    stripped = context.rstrip()
    text = context[len(stripped) :] + text
    before = self.encode(stripped) if stripped else []
    if not before:
      before, tokens = [self.prefix_token], self.encode(text, special=False)
      return (tokens[:1], tokens[1:]) if tokens[:1] == before else (before, tokens)
    tokens = self.encode(stripped + text)[len(before) :]
    return before, tokens or self.encode(text, special=False)

  def report_truncated(self) -> None:
    """Prints how many contexts were truncated, if any."""
    if self.truncated:
      print(
        f"[{len(self.truncated)} prompts exceeded the model's context and were truncated on the "
        "left]",
        file=sys.stderr,
      )

  def _truncate(self, context, tokens, room):
    if len(tokens) > room:
      self.truncated.add(request_id(context))
    return tokens[-room:]


@dataclasses.dataclass(frozen=True)
class TaskRequests:
  """Examples of a task with their requests.

  Attributes:
    task: the task.
    examples: X examples.
    answering: for each example, the requests that answer it: one per choice, or one per sample;
      for examples of kind "read", that of the reference.
    references: for each example, the request that scores its reference, or None.
  """

  task: Task
  examples: Sequence[Example]
  answering: Sequence[Sequence[Request]]
  references: Sequence[Continuation | None]

  @classmethod
  def of(
    cls,
    builder: RequestBuilder,
    task: Task,
    examples: Sequence[Example],
    num_samples: int = 1,
    sampler: tuple[float, int, float] = GREEDY,
  ) -> "TaskRequests":
    """Makes the requests of a task's examples.

    A raw reference ends with an end-of-text token, except for examples of kind "read", which have
    no end. The end of a chat is the template's to decide.

    Args:
      builder: the model's.
      task: the task.
      examples: its examples.
      num_samples: samples of generated answers; 0 if only references are wanted.
      sampler: how they are sampled.

    Raises:
      ValueError: a request does not fit the model.
    """
    answering, references = [], []
    for e in examples:
      try:
        context = builder.context(e)
        ends = builder.settings["chat"] is None and e.kind != "read"
        together = choices_address(e.choices or ())
        reference = e.reference and builder.continuation(context, e.reference, ends, together)
        references.append(reference)
        if e.choices is not None:
          answering.append([builder.continuation(context, c, instead=together) for c in e.choices])
        elif e.kind == "read":
          answering.append([reference])
        else:
          answering.append(
            [
              builder.prompt(context, e.max_new_tokens, e.stop, sampler, sample)
              for sample in range(num_samples)
            ]
          )
      except ValueError as error:
        raise ValueError(f"{e.id}: {error}") from error
    return cls(task, examples, answering, references)

  def __getitem__(self, part: slice) -> "TaskRequests":
    return TaskRequests(self.task, self.examples[part], self.answering[part], self.references[part])

  def __len__(self) -> int:
    return len(self.examples)

  @property
  def all_answering(self) -> list[Request]:
    """The requests of `answering` in one list."""
    return list(itertools.chain(*self.answering))

  @property
  def all_references(self) -> list[Continuation]:
    """The references of the examples that have one."""
    return [r for r in self.references if r is not None]

  def by_example(self, answers: Iterable[Any]) -> Iterator[list[Any]]:
    """Yields, for each example, its part of the answers to `all_answering`."""
    answers = iter(answers)
    return ([next(answers) for _ in requests] for requests in self.answering)
