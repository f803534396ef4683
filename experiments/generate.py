"""Generates text with a roster, for one prompt or for a file of prompts.

  python -m experiments.generate --checkpoint=embedded:wordmath_control \\
      --prompt="Question: Tom has 3 apples. ..." --num_members=16 --tau=0.3

--prompt streams the answer to the terminal. Without it, the program reads one JSON object
per line from --input (default: standard input), with "prompt" (text) or "prompt_tokens"
(ids) and optionally "id" (any JSON value, copied to the result). It writes one JSON object
per line to --output (default: standard output), in input order, each with its "index". An
interrupted run resumes when rerun with the same --output.

With --chat, a prompt is a user message that the checkpoint's chat template renders. A line
may have "messages" (a list of {"role", "content"}) instead; a final assistant message is
the start of the answer. Results then also have "answer" (null if generation ended before
it) and "reasoning".
"""

import dataclasses
import sys
import time
from typing import Any

from absl import flags

from checkpoints_convert import outputs
from experiments.cli import app, text_files, trace_file
from experiments.records import jsonl
from roe_jax import batching, decode, stopping
from roe_jax.numerics import naming_sequences
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler
from roe_jax.text import tokenizer as tokenizer_lib
from roe_jax.text.chat import Chat, Prompt
from roe_jax.text.tokenizer import StreamDecoder, Tokenizer

FLAGS = flags.FLAGS
# Keys of an input line.
KEYS = ("id", "prompt", "messages", "prompt_tokens")


def define_flags() -> None:
  app.define_model_flags()
  app.define_roster_flags()
  app.define_dry_run_flags()
  trace_file.define_flag()
  app.define_chat_flags()
  flags.DEFINE_string("prompt", None, "Prompt to complete at the terminal.")
  flags.DEFINE_string(
    "input", None, "File of prompts, one JSON object per line. Default: standard input."
  )
  flags.DEFINE_string("output", None, "File of results. Default: standard output.")
  flags.DEFINE_integer("max_new_tokens", 256, "Maximum number of tokens generated per prompt.")
  flags.DEFINE_multi_string("stop", [], "String that ends generation; may be repeated.")
  flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 decodes greedily.")
  flags.DEFINE_integer("top_k", 0, "Sample from the top k tokens; 0 samples from all.")
  flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of tokens with this probability.")
  flags.DEFINE_integer(
    "batch_size", 16, "Number of sequences decoded together; a finished one is replaced at once."
  )
  flags.DEFINE_bool(
    "special_tokens",
    True,
    "Add the tokenizer's special tokens (such as BOS) to prompts; not for chats, whose template "
    "has its own.",
  )
  flags.DEFINE_bool(
    "show_reasoning", False, "With --prompt and --chat, print the reasoning to standard error."
  )


@dataclasses.dataclass(frozen=True)
class GenerationInputs:
  """Validated inputs, made before the parameters are loaded.

  Attributes:
    requests: the lines of --input, or one for --prompt.
    tokens: token ids of each prompt.
    chat: the chat format; None for raw prompts.
    prompts: rendered chats; empty for raw prompts.
    stop_tokens: tokens that end generation.
    settings: everything that results depend on.
  """

  requests: list[dict[str, Any]]
  tokens: list[list[int]]
  chat: Chat | None
  prompts: list[Prompt]
  stop_tokens: tuple[int, ...]
  settings: dict[str, Any]

  def answer(self, index: int, completion) -> dict[str, Any]:
    """Returns the entries that a chat adds to a result."""
    if self.chat is None:
      return {}
    found = self.chat.answer(self.prompts[index], completion, FLAGS.stop)
    return {"answer": found.final, "reasoning": found.reasoning}


def open_chat(requests: list[dict[str, Any]], tokenizer: Tokenizer) -> Chat | None:
  """Returns the chat format if flags or requests ask for one."""
  use_chat = FLAGS.chat or any("messages" in r for r in requests)
  if use_chat and FLAGS["special_tokens"].present:
    raise ValueError(
      "--special_tokens applies to raw prompts only: remove it, since a chat template adds its own"
    )
  if FLAGS.show_reasoning and not use_chat:
    raise ValueError("--show_reasoning applies to chats only: add --chat")
  return app.load_chat(tokenizer, use_chat)


def messages_of(request: dict[str, Any], what: str) -> list[dict[str, Any]]:
  """Returns the messages of a chat request, including --system.

  Raises:
    ValueError: it has neither a prompt nor messages, or both.
  """
  has_prompt = "prompt" in request
  if ("messages" in request) == has_prompt or (has_prompt and not FLAGS.chat):
    raise ValueError(
      f'{what} must have either "messages" (a list) or, with --chat, "prompt" (the user message)'
    )
  messages = request.get("messages", [{"role": "user", "content": request.get("prompt")}])
  if FLAGS.system is None or not isinstance(messages, list):
    return messages
  if any(isinstance(m, dict) and m.get("role") == "system" for m in messages):
    raise ValueError(f"{what} has a system message: remove it or --system")
  return [{"role": "system", "content": FLAGS.system}, *messages]


def prepare(
  requests: list[dict[str, Any]], config, tokenizer: Tokenizer, roster: Roster, sampler: Sampler
) -> GenerationInputs:
  """Tokenizes and validates requests."""
  chat = open_chat(requests, tokenizer)
  stop_tokens = tokenizer_lib.stop_tokens(tokenizer, config, chat.stop_tokens if chat else ())
  settings = {
    "checkpoint": FLAGS.checkpoint,
    "dtype": FLAGS.dtype or config.dtype,
    "roster": roster.settings(),
    "sampler": sampler.settings(),
    "max_new_tokens": FLAGS.max_new_tokens,
    "stop": FLAGS.stop,
  }
  prompts = []
  if chat is None:
    tokens = [
      jsonl.tokens_of(
        r, "prompt", lambda t: tokenizer.encode(t, FLAGS.special_tokens), f"input request {i}"
      )
      for i, r in enumerate(requests, 1)
    ]
    settings["special_tokens"] = FLAGS.special_tokens
  else:
    for i, request in enumerate(requests, 1):
      what = f"input request {i}" if FLAGS.prompt is None else "--prompt"
      messages = messages_of(request, what)
      try:
        prompts.append(chat.prompt(messages))
      except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    tokens = [p.tokens for p in prompts]
    settings["chat"] = chat.settings | {"system": FLAGS.system}
  what = "input request" if FLAGS.prompt is None else "prompt"
  batching.check_tokens(config, tokens, room=1, what=what, first=1)
  settings["stop_tokens"] = list(stop_tokens)
  return GenerationInputs(requests, tokens, chat, prompts, stop_tokens, settings)


class Printer:
  """Prints a growing text, except an end that may be the start of a stop string."""

  def __init__(self, file):
    self._file = file
    self._hold_back = max(map(len, FLAGS.stop), default=1) - 1  # characters
    self._printed = 0

  def show(self, text: str, done: bool = False) -> None:
    """Prints what is new in `text`, the whole text so far."""
    end = len(text) if done else len(text) - self._hold_back
    if end > self._printed:
      self._file.write(text[self._printed : end])
      self._printed = end
    if done:
      self._file.write("\n")
    self._file.flush()


def stream_to_terminal(
  params, config, tokenizer, roster: Roster, sampler: Sampler, inputs: GenerationInputs
) -> None:
  """Completes --prompt, streaming text to stdout and a summary to stderr."""
  text, completion, begin, first = "", None, time.perf_counter(), None
  reader = inputs.chat.reader(inputs.prompts[0]) if inputs.chat else None
  decoder, count = StreamDecoder(tokenizer), 0
  printer, reasoning = Printer(sys.stdout), Printer(sys.stderr)
  for completion in decode.stream(
    params,
    config,
    inputs.tokens[0],
    max_new_tokens=FLAGS.max_new_tokens,
    roster=roster,
    sampler=sampler,
    stop_tokens=inputs.stop_tokens,
    stop_strings=FLAGS.stop,
    decode=tokenizer.decode,
    stop_reader=inputs.chat and inputs.chat.stop_reader(inputs.prompts),
  ):
    first = first or time.perf_counter()
    new, count = completion.tokens[count:], len(completion.tokens)
    if completion.finish_reason:
      break
    for token in new:
      if reader:
        reader.push(token)
      else:
        text += decoder.push(token)
    if reader:
      found = reader.answer()
      text = found.final or ""
      if FLAGS.show_reasoning:
        reasoning.show(found.reasoning)
    printer.show(text)
  assert completion is not None and first is not None  # the stream yields at least once
  if inputs.chat:
    show_answer(inputs, completion, printer, reasoning)
  else:
    printer.show(completion.text or "", done=True)
  # The first token includes compilation, so the rate is that of the others.
  rate = (count - 1) / (time.perf_counter() - first) if count > 1 else float("nan")
  changed = sum(a != b for a, b in zip(completion.tokens, completion.clean_tokens) if b >= 0)
  print(
    f"[{count} tokens, {completion.finish_reason}; first after {first - begin:.1f} s, then "
    f"{rate:.1f} tokens/s; {changed} differ from the clean member's choice]\n"
    f"[settings: {text_files.to_json(inputs.settings)}]",
    file=sys.stderr,
  )


def show_answer(inputs: GenerationInputs, completion, printer: Printer, reasoning: Printer) -> None:
  """Prints the rest of an answer, or why there is none."""
  assert inputs.chat
  found = inputs.chat.answer(inputs.prompts[0], completion, FLAGS.stop)
  if FLAGS.show_reasoning and found.reasoning:
    reasoning.show(found.reasoning, done=True)
  if found.final is not None:
    printer.show(found.final, done=True)
  elif completion.finish_reason == "length":
    print(
      f"[no answer: the reasoning exceeded {FLAGS.max_new_tokens} tokens; increase "
      "--max_new_tokens]",
      file=sys.stderr,
    )
  else:
    print(f"[no answer: the reasoning ended early ({completion.finish_reason})]", file=sys.stderr)


def complete_lines(
  params,
  config,
  tokenizer,
  roster: Roster,
  sampler: Sampler,
  inputs: GenerationInputs,
  results: jsonl.Results,
) -> None:
  """Completes the prompts of --input, writing each result when it is done."""
  with (
    results,
    app.progress(
      total=len(inputs.requests), initial=len(inputs.requests) - len(results.missing), unit="prompt"
    ) as bar,
  ):
    indices = results.missing
    unanswered = 0

    def write(position, completion):
      nonlocal unanswered
      answer = inputs.answer(indices[position], completion)
      unanswered += answer.get("answer", "") is None
      results.write(indices[position], dataclasses.asdict(completion) | answer)
      bar.update()

    with naming_sequences([f"input request {i + 1}" for i in indices]):
      generation = decode.generate(
        params,
        config,
        [inputs.tokens[i] for i in indices],
        max_new_tokens=FLAGS.max_new_tokens,
        roster=roster,
        sampler=sampler,
        stop_tokens=inputs.stop_tokens,
        stop_strings=FLAGS.stop,
        decode=tokenizer.decode,
        stop_reader=inputs.chat and inputs.chat.stop_reader([inputs.prompts[i] for i in indices]),
        request_ids=indices,
        batch_size=FLAGS.batch_size,
        on_finished=write,
      )
  completed = zip(inputs.tokens, generation.completions)
  trace_file.write(params, config, roster, [list(t) + list(c.tokens) for t, c in completed])
  print(
    f"[{len(indices)} prompts: {generation.throughput}; including compilation]", file=sys.stderr
  )
  if unanswered:
    print(
      f"[{unanswered} results ended before the answer: increase --max_new_tokens "
      f"({FLAGS.max_new_tokens}) for longer reasoning]",
      file=sys.stderr,
    )


def main(argv) -> None:
  del argv
  if FLAGS.prompt is not None and (FLAGS.input is not None or FLAGS.output is not None):
    raise ValueError("--prompt prints to the terminal: use either it or --input and --output")
  if FLAGS.show_reasoning and FLAGS.prompt is None:
    raise ValueError('--show_reasoning applies to --prompt only: lines always have "reasoning"')
  if FLAGS.max_new_tokens < 1 or FLAGS.batch_size < 1:
    raise ValueError("--max_new_tokens and --batch_size must be at least 1")
  app.refuse_idle(FLAGS.prompt is not None, ("trace",), "applies to --input only: remove --prompt")
  trace_file.check()
  stopping.check_strings(FLAGS.stop)
  app.refuse_idle(
    FLAGS.temperature == 0,
    ("top_k", "top_p"),
    "applies to sampling only: set --temperature above 0",
  )
  sampler = Sampler.create(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
  # Validate everything else before loading the parameters.
  config = app.load_config(FLAGS.checkpoint)
  roster = app.roster_from_flags(config)
  if FLAGS.dry_run:
    app.print_dry_run(config, roster, batch_size=FLAGS.batch_size)
    return
  tokenizer = app.load_tokenizer(FLAGS.checkpoint)
  requests = jsonl.read(FLAGS.input, KEYS) if FLAGS.prompt is None else [{"prompt": FLAGS.prompt}]
  inputs = prepare(requests, config, tokenizer, roster, sampler)
  results = FLAGS.prompt is None and jsonl.Results(FLAGS.output, requests, inputs.settings)
  if results and FLAGS.trace is not None and len(results.missing) < len(requests):
    raise ValueError("--trace needs all results of one run: choose another --output")
  longest = max(map(len, inputs.tokens)) + FLAGS.max_new_tokens
  batch_size = FLAGS.batch_size if FLAGS.prompt is None else 1
  app.check_memory(config, roster, batch_size=batch_size, length=longest)
  params, config = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
  model = params, config, tokenizer, roster, sampler, inputs
  if results:
    complete_lines(*model, results)
  else:
    stream_to_terminal(*model)


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, output=outputs.FILE)


if __name__ == "__main__":
  program()
