"""Continues prompts with a roster, at a terminal or line by line.

  python -m experiments.generate --checkpoint=embedded:wordmath_control \\
      --prompt="Question: Tom has 3 apples. ..." --num_members=16 --temperature_profile=0.3

With --prompt the tokens are printed as they come. Without it, prompts are read
from --input (or standard input), one JSON object a line with "prompt" (text) or
"prompt_tokens" (ids) and optionally "id" (any JSON value, handed through), and
results are written to --output (or standard output), one JSON object a line in
the same order, each with its "index". --output gets results as they are
finished, and is put in order at the end; results that it already holds are not
computed again.
"""

import dataclasses
import json
import sys
import time

from absl import flags
from tqdm import tqdm

from experiments import app, jsonl
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
  flags.DEFINE_integer("batch_size", 16, "Slots, that is prompts decoded together: where one "
                       "ends, the next takes its place.")
  flags.DEFINE_bool("special_tokens", True, "Whether the tokenizer's own special tokens (such as "
                    "BOS) are put around prompts.")


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
  """Continues the prompts of --input, writing each result when it is finished."""
  requests = jsonl.read(FLAGS.input)
  prompts = [
      jsonl.tokens_of(r, "prompt", lambda t: tokenizer.encode(t, FLAGS.special_tokens),
                      f"input request {i}") for i, r in enumerate(requests)]
  batching.check_tokens(config, prompts, room=1)
  settings = {"checkpoint": FLAGS.checkpoint, "dtype": config.dtype,
              "roster": roster.settings(), "sampler": sampler.settings(),
              "max_new_tokens": FLAGS.max_new_tokens, "stop": FLAGS.stop,
              "special_tokens": FLAGS.special_tokens}
  with jsonl.Results(FLAGS.output, requests, settings) as results, tqdm(
      total=len(requests), initial=len(requests) - len(results.missing), unit="prompt",
      file=sys.stderr) as bar:
    indices = results.missing

    def write(position, completion):
      results.write(indices[position], dataclasses.asdict(completion))
      bar.update()

    throughput = decode.generate(
        params, config, [prompts[i] for i in indices], max_new_tokens=FLAGS.max_new_tokens,
        roster=roster, sampler=sampler, stop_strings=FLAGS.stop, decode=tokenizer.decode,
        request_ids=indices, batch_size=FLAGS.batch_size, on_finished=write).throughput
  print(f"[{len(indices)} prompts: {throughput}; compilation included]", file=sys.stderr)


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
