"""Log-probabilities of continuations, or the perplexity of a text, with a roster.

  python -m experiments.score --checkpoint=olmoe --text=wiki.txt --window=2048 \\
      --num_members=16 --temperature_profile=0.2
  python -m experiments.score --checkpoint=olmoe --input=pairs.jsonl --output=scores.jsonl

--text: a file of plain text; the perplexity over strided windows is printed (and
written to --output as JSON) beside that of the plain model. Otherwise --input
(or standard input) holds one JSON object a line with "prompt" and "continuation"
(text, or ids as "prompt_tokens" and "continuation_tokens"), and the summed
log-probability of each continuation, whether it is the greedy one, and its
tokens' log-probabilities are written to --output (or standard output); results
that --output already holds are not computed again.
"""

import json
import pathlib
import sys

from absl import flags
import numpy as np
from tqdm import tqdm

from experiments import app, jsonl
from roe_jax import batching, score
from roe_jax.roster import Roster

FLAGS = flags.FLAGS


def define_flags() -> None:
  app.define_model_flags()
  app.define_roster_flags()
  app.define_dry_run_flags()
  flags.DEFINE_string("text", None, "File of plain text whose perplexity is wanted.")
  flags.DEFINE_integer("window", None, "Tokens in a window; the model's context by default.")
  flags.DEFINE_integer("stride", None, "Tokens between windows; half a window by default.")
  flags.DEFINE_string("input", None, "File of prompts and continuations; '-' or absent: standard "
                      "input.")
  flags.DEFINE_string("output", None, "File of results; absent: standard output.")
  flags.DEFINE_integer("batch_size", 8, "Texts scored together.")
  flags.DEFINE_bool("special_tokens", True, "Whether the tokenizer's own special tokens (such as "
                    "BOS) are put around prompts and texts.")


def text_perplexity(params, config, tokenizer, roster: Roster) -> None:
  """Prints the perplexity of --text with the plain model and with the roster."""
  path = pathlib.Path(FLAGS.text)
  if not path.is_file():
    raise FileNotFoundError(f"--text={path} does not exist")
  tokens = tokenizer.encode(path.read_text(), FLAGS.special_tokens)
  plain = Roster.create(config)
  results = {}
  for name, setting in {"plain": plain, "roster": roster}.items():
    if name == "roster" and roster.is_plain:
      continue
    with tqdm(desc=name, unit="window", file=sys.stderr) as bar:
      found = score.perplexity(
          params, config, tokens, window=FLAGS.window, stride=FLAGS.stride, roster=setting,
          batch_size=FLAGS.batch_size, on_batch=bar.update)
    results[name] = found
    print(f"{name}: perplexity {found.perplexity[0]:.4f} over {len(found.nll)} tokens in "
          f"{found.num_windows} windows of {found.settings['window']}, stride "
          f"{found.settings['stride']}")
  if "roster" in results:
    change = results["roster"].perplexity[0] / results["plain"].perplexity[0] - 1
    print(f"difference: {100 * change:+.3f} %")
  if FLAGS.output:
    app.write_atomically(pathlib.Path(FLAGS.output), json.dumps({
        name: {"perplexity": float(found.perplexity[0]), "tokens": len(found.nll),
               "windows": found.num_windows, "settings": found.settings}
        for name, found in results.items()} | {"checkpoint": FLAGS.checkpoint}, indent=2) + "\n")


def continuations(params, config, tokenizer, roster: Roster) -> None:
  """Scores the continuations of --input, writing results as batches finish."""
  requests = jsonl.read(FLAGS.input)
  texts, starts = [], []
  for i, request in enumerate(requests):
    what = f"input request {i}"
    prompt = jsonl.tokens_of(
        request, "prompt", lambda t: tokenizer.encode(t, FLAGS.special_tokens), what)
    continuation = jsonl.tokens_of(
        request, "continuation", lambda t: tokenizer.encode(t, add_special_tokens=False), what)
    batching.check_tokens(config, [prompt], what=f"prompt of {what}:")
    batching.check_tokens(config, [continuation], what=f"continuation of {what}:")
    texts.append(prompt + continuation)
    starts.append(len(prompt))
  batching.check_tokens(config, texts, what="text")
  settings = {"checkpoint": FLAGS.checkpoint, "dtype": config.dtype,
              "roster": roster.settings(), "special_tokens": FLAGS.special_tokens}
  with jsonl.Results(FLAGS.output, requests, settings) as results, tqdm(
      total=len(requests), initial=len(requests) - len(results.missing), unit="text",
      file=sys.stderr) as bar:
    indices = results.missing
    for first in range(0, len(indices), FLAGS.batch_size):
      batch = indices[first:first + FLAGS.batch_size]
      scores = score.score(
          params, config, [texts[i] for i in batch], [starts[i] for i in batch], roster=roster,
          request_ids=batch, batch_size=FLAGS.batch_size)
      for i, found in zip(batch, scores.texts):
        tokens = texts[i][starts[i]:]
        results.write(i, {
            "log_prob": float(found.log_probs[:, 0].sum(dtype=np.float64)),
            "is_greedy": found.greedy_tokens.tolist() == tokens,
            "tokens": tokens, "log_probs": found.log_probs[:, 0].tolist()})
      bar.update(len(batch))


def main(argv) -> None:
  del argv
  if FLAGS.text is not None and FLAGS.input is not None:
    raise ValueError("--text asks for a perplexity and --input for continuations: give one")
  if FLAGS.batch_size < 1:
    raise ValueError("--batch_size must be at least 1")
  config = app.load_config(FLAGS.checkpoint)
  roster = app.roster_from_flags(config)
  if FLAGS.dry_run:
    app.dry_run(config, roster, batch_size=FLAGS.batch_size, length=FLAGS.window, scoring=True)
    return
  params, config, tokenizer = app.open_model(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
  if FLAGS.text is not None:
    text_perplexity(params, config, tokenizer, roster)
  else:
    continuations(params, config, tokenizer, roster)


if __name__ == "__main__":
  define_flags()
  app.run(main)
