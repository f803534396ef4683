"""Continues prompts with a roster, at a terminal or line by line.

  python -m experiments.generate --checkpoint=embedded:wordmath_control \\
      --prompt="Question: Tom has 3 apples. ..." --num_members=16 --temperature_profile=0.3

With --prompt the tokens are printed as they come. Without it, prompts are read
from --input (or standard input), one JSON object a line with "prompt" (text) or
"tokens" (ids) and optionally "id" (any JSON value, handed through), and results
are written to --output (or standard output), one JSON object a line in the same
order; lines that --output already holds are not computed again.
"""

import dataclasses
import json
import pathlib
import sys
import time

from absl import flags
from tqdm import tqdm

from experiments import app
from roe_jax import batching, decode
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler
from roe_jax.tokenizer import StreamDecoder

FLAGS = flags.FLAGS


def define_flags() -> None:
  app.define_model_flags()
  app.define_roster_flags()
  flags.DEFINE_string("prompt", None, "Text to continue.")
  flags.DEFINE_string("input", None, "File of prompts, one JSON object a line; '-' or absent: "
                      "standard input.")
  flags.DEFINE_string("output", None, "File of results; absent: standard output.")
  flags.DEFINE_integer("max_new_tokens", 256, "At most this many tokens a prompt.")
  flags.DEFINE_multi_string("stop", [], "String that ends a text; may be repeated.")
  flags.DEFINE_float("temperature", 0.0, "Of sampling from the roster's distribution; 0: greedy.")
  flags.DEFINE_integer("top_k", 0, "Sample from this many tokens; 0: all.")
  flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of this probability.")
  flags.DEFINE_integer("batch_size", 16, "Prompts decoded together.")
  flags.DEFINE_bool("special_tokens", True, "Whether the tokenizer's own special tokens (such as "
                    "BOS) are put around prompts.")


def read_requests(lines, tokenizer, add_special_tokens: bool) -> list[dict]:
  """Requests with "tokens" from JSON lines.

  Raises:
    ValueError: a line is not a JSON object with "prompt" or "tokens".
  """
  requests = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      request = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"input line {number} is not valid JSON: {error}") from error
    if not isinstance(request, dict) or (
        not isinstance(request.get("prompt"), str) and not isinstance(request.get("tokens"), list)):
      raise ValueError(
          f"input line {number} must be a JSON object with \"prompt\" (text) or \"tokens\" (ids)")
    if "tokens" not in request:
      request["tokens"] = tokenizer.encode(request["prompt"], add_special_tokens)
    elif not all(isinstance(t, int) and not isinstance(t, bool) for t in request["tokens"]):
      raise ValueError(f"input line {number}: \"tokens\" must be integers")
    requests.append(request)
  if not requests:
    raise ValueError("the input holds no prompt")
  return requests


def stream_to_terminal(params, config, tokenizer, roster: Roster, sampler: Sampler) -> None:
  """Continues --prompt, printing text as it comes and a summary to stderr."""
  prompt = tokenizer.encode(FLAGS.prompt, FLAGS.special_tokens)
  batching.check_tokens(config, [prompt], room=1)
  text, completion, begin, first = "", None, time.perf_counter(), None
  decoder = StreamDecoder(tokenizer)
  # What may be the beginning of a stop string is held back.
  held = max(map(len, FLAGS.stop), default=1) - 1
  printed = 0
  count = 0
  for completion in decode.stream(
      params, config, prompt, max_new_tokens=FLAGS.max_new_tokens, roster=roster, sampler=sampler,
      stop_strings=FLAGS.stop, decode=tokenizer.decode):
    first = first or time.perf_counter()
    for token in completion.tokens[count:]:
      text += decoder.push(token)
    count = len(completion.tokens)
    if not completion.finish_reason and len(text) - held > printed:
      sys.stdout.write(text[printed:len(text) - held])
      sys.stdout.flush()
      printed = len(text) - held
  print(completion.text[printed:])
  # The first token waits for compilation; the rate is that of the others.
  rate = (count - 1) / (time.perf_counter() - first) if count > 1 else float("nan")
  changed = sum(a != b for a, b in zip(completion.tokens, completion.clean_tokens) if b >= 0)
  print(
      f"[{count} tokens, {completion.finish_reason}; first after {first - begin:.1f} s, then "
      f"{rate:.1f} tokens/s; {changed} chosen differently from the clean member]\n"
      f"[settings: {json.dumps({'roster': roster.settings(), 'sampler': sampler.settings()})}]",
      file=sys.stderr)


def complete_lines(params, config, tokenizer, roster: Roster, sampler: Sampler) -> None:
  """Continues the prompts of --input, writing results as batches finish."""
  source = FLAGS.input if FLAGS.input not in (None, "-") else None
  if source is not None and not pathlib.Path(source).is_file():
    raise FileNotFoundError(f"--input={source} does not exist")
  lines = pathlib.Path(source).read_text().splitlines() if source else sys.stdin
  requests = read_requests(lines, tokenizer, FLAGS.special_tokens)
  settings = {"checkpoint": FLAGS.checkpoint, "dtype": config.dtype,
              "roster": roster.settings(), "sampler": sampler.settings(),
              "max_new_tokens": FLAGS.max_new_tokens, "stop": FLAGS.stop}
  batching.check_tokens(config, [r["tokens"] for r in requests], room=1)
  finished = _finished(requests, settings) if FLAGS.output else 0
  if finished:
    print(f"[{FLAGS.output} already holds {finished} of {len(requests)} results]", file=sys.stderr)
  out = open(FLAGS.output, "a") if FLAGS.output else sys.stdout
  todo = requests[finished:]
  begin = time.perf_counter()
  tokens = 0
  with tqdm(total=len(requests), initial=finished, unit="prompt", file=sys.stderr) as bar:
    waiting = iter(todo)

    def write(completions):
      nonlocal tokens
      for completion in completions:
        request = next(waiting)
        record = {k: v for k, v in request.items() if k in ("id", "prompt")}
        record |= dataclasses.asdict(completion) | {"settings": settings}
        out.write(json.dumps(record) + "\n")
        tokens += len(completion.tokens)
      out.flush()
      bar.update(len(completions))

    if todo:
      decode.generate(
          params, config, [r["tokens"] for r in todo], max_new_tokens=FLAGS.max_new_tokens,
          roster=roster, sampler=sampler, stop_strings=FLAGS.stop, decode=tokenizer.decode,
          request_ids=range(finished, len(requests)), batch_size=FLAGS.batch_size, on_batch=write)
  seconds = time.perf_counter() - begin
  print(f"[{len(todo)} prompts, {tokens} tokens in {seconds:.1f} s, compilation included]",
        file=sys.stderr)
  if FLAGS.output:
    out.close()


def _finished(requests, settings) -> int:
  """How many results of an earlier run --output holds; a torn last line is cut off.

  Raises:
    ValueError: the file holds something else.
  """
  path = pathlib.Path(FLAGS.output)
  if not path.exists():
    return 0
  whole, _, torn = path.read_text().rpartition("\n")
  if torn:
    app.write_atomically(path, whole + "\n" if whole else "")
  results = [json.loads(line) for line in whole.splitlines()]
  same = len(results) <= len(requests) and all(
      result.get("settings") == settings and result.get("id") == request.get("id")
      and result.get("prompt") == request.get("prompt")
      for result, request in zip(results, requests))
  if not same:
    raise ValueError(
        f"--output={path} holds results of other prompts or settings: name another file, or "
        "remove it")
  return len(results)


def main(argv) -> None:
  del argv
  if FLAGS.prompt is not None and (FLAGS.input is not None or FLAGS.output is not None):
    raise ValueError("--prompt prints to the terminal: give it, or --input and --output, not both")
  if FLAGS.max_new_tokens < 1 or FLAGS.batch_size < 1:
    raise ValueError("--max_new_tokens and --batch_size must be at least 1")
  sampler = Sampler.create(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
  # The roster is checked before the parameters are read.
  config = app.load_config(FLAGS.checkpoint)
  roster = app.roster_from_flags(config)
  params, config, tokenizer = app.open_model(FLAGS.checkpoint, FLAGS.dtype)
  if FLAGS.prompt is not None:
    stream_to_terminal(params, config, tokenizer, roster, sampler)
  else:
    complete_lines(params, config, tokenizer, roster, sampler)


if __name__ == "__main__":
  define_flags()
  app.run(main)
