"""Computes the perplexity of a text file, or log-probabilities of continuations, with a roster.

  python -m experiments.score --checkpoint=olmoe --text=wiki.txt --window=2048 \\
      --num_members=16 --tau=0.2
  python -m experiments.score --checkpoint=olmoe --input=pairs.jsonl --output=scores.jsonl

--text prints the perplexity of a text file over strided windows, for the baseline and for
the roster. With --output it also writes them as JSON, and each token's negative
log-probability to OUTPUT.windows.jsonl.

Without --text, the program reads one JSON object per line from --input (default: standard
input), with "prompt" and "continuation" (text, or ids in "prompt_tokens" and
"continuation_tokens"). For each it writes one JSON object to --output (default: standard
output): the continuation's summed log-probability, whether it is the greedy one, and the
log-probability of each token. Both modes resume when rerun with the same --output.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

from absl import flags
import numpy as np

from checkpoints_convert import outputs
from experiments.cli import app, text_files, trace_file
from experiments.records import jsonl, store
from roe_jax import batching, scoring
from roe_jax.config import ModelConfig
from roe_jax.numerics import naming_sequences
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS
# Keys of an input line.
KEYS = ("id", "prompt", "continuation", "prompt_tokens", "continuation_tokens")


def define_flags() -> None:
  app.define_model_flags()
  app.define_roster_flags()
  app.define_dry_run_flags()
  trace_file.define_flag()
  flags.DEFINE_string("text", None, "Text file to compute the perplexity of.")
  flags.DEFINE_integer("window", None, "Tokens per window. Default: the model's context.")
  flags.DEFINE_integer("stride", None, "Tokens between windows. Default: half a window.")
  flags.DEFINE_string(
    "input",
    None,
    "File of prompts and continuations, one JSON object per line. Default: standard input.",
  )
  flags.DEFINE_string("output", None, "File of results. Default: standard output.")
  flags.DEFINE_integer("batch_size", 8, "Number of sequences scored together.")
  flags.DEFINE_bool(
    "special_tokens", True, "Add the tokenizer's special tokens (such as BOS) to prompts and texts."
  )


def text_perplexity(
  params: Params, config: ModelConfig, roster: Roster, tokens: list[int], cut: scoring.Windows
) -> None:
  """Prints the perplexity of --text, cut into windows, under the baseline and the roster."""
  common = {"window": cut.window, "stride": cut.stride}
  output = FLAGS.output and pathlib.Path(FLAGS.output)
  kept = store.SavedValues(
    None
    if output is None or outputs.is_stream(output)
    else pathlib.Path(f"{output}.windows.jsonl"),
    common
    | {
      "checkpoint": FLAGS.checkpoint,
      "dtype": config.dtype,
      "roster": roster.settings(),
      "batch_size": FLAGS.batch_size,
      "tokens": hashlib.sha256(np.array(tokens, np.int32).tobytes()).hexdigest(),
    },
  )
  results = {}
  for name, setting in {"baseline": Roster.create(config), "roster": roster}.items():
    if name == "roster" and roster.is_baseline and roster.router_bias is None:
      continue
    nll = []
    with app.progress(desc=name, unit="window", total=len(cut.sequences)) as bar:
      for first in range(0, len(cut.sequences), FLAGS.batch_size):
        batch = range(first, min(first + FLAGS.batch_size, len(cut.sequences)))
        nll += kept.get(
          f"{name}, windows from {first} on",
          lambda: [
            (-t.log_probs[:, 0]).tolist()
            for t in score_batch(params, config, cut.sequences, cut.starts, setting, batch)
          ],
        )
        bar.update(len(batch))
    nll = np.concatenate(nll)
    perplexity = float(np.exp(nll.mean()))
    results[name] = {
      "perplexity": perplexity,
      "tokens": len(nll),
      "windows": len(cut.sequences),
      "settings": common | {"roster": setting.settings(), "model": dataclasses.asdict(config)},
    }
    print(
      f"{name}: perplexity {perplexity:.4f} over {len(nll)} tokens in {len(cut.sequences)} windows "
      f"of {cut.window}, stride {cut.stride}"
    )
  if "roster" in results:
    change = results["roster"]["perplexity"] / results["baseline"]["perplexity"] - 1
    print(f"difference: {100 * change:+.3f} %")
  if output:
    app.write_atomically(
      output, text_files.to_json(results | {"checkpoint": FLAGS.checkpoint}, indent=2) + "\n"
    )


def _read_text() -> str:
  try:
    return text_files.read(FLAGS.text)
  except (FileNotFoundError, ValueError) as error:
    raise ValueError(f"--text: {error}") from error


def score_batch(
  params, config, sequences, starts, roster: Roster, batch: Sequence[int]
) -> list[scoring.SequenceScore]:
  """Scores the sequences with the indices `batch`, which are also their request ids."""
  what = "window" if FLAGS.text is not None else "input request"
  with naming_sequences([f"{what} {i + 1}" for i in batch]):
    return scoring.score(
      params,
      config,
      [sequences[i] for i in batch],
      [starts[i] for i in batch],
      roster=roster,
      request_ids=batch,
      batch_size=FLAGS.batch_size,
    ).sequences


def read_pairs(
  config: ModelConfig, tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]], list[list[int]], list[int]]:
  """Returns the requests of --input, their tokens, and where their continuations start.

  Raises:
    FileNotFoundError, ValueError: the input cannot be read, or a request does not fit the model.
  """
  requests = jsonl.read(FLAGS.input, KEYS)
  sequences, starts = [], []
  for i, request in enumerate(requests, 1):
    what = f"input request {i}"
    prompt = jsonl.tokens_of(
      request, "prompt", lambda t: tokenizer.encode(t, FLAGS.special_tokens), what
    )
    continuation = jsonl.tokens_of(
      request, "continuation", lambda t: tokenizer.encode(t, add_special_tokens=False), what
    )
    batching.check_tokens(config, [prompt], what="prompt of input request", first=i)
    batching.check_tokens(config, [continuation], what="continuation of input request", first=i)
    sequences.append(prompt + continuation)
    starts.append(len(prompt))
  batching.check_tokens(config, sequences, what="input request", first=1)
  return requests, sequences, starts


def continuations(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  requests: list[dict[str, Any]],
  sequences: list[list[int]],
  starts: list[int],
  results: jsonl.Results,
) -> None:
  """Scores the continuations of --input, writing results as batches are done."""
  with (
    results,
    app.progress(
      total=len(requests), initial=len(requests) - len(results.missing), unit="sequence"
    ) as bar,
  ):
    for first in range(0, len(requests), FLAGS.batch_size):
      # A resumed run keeps the batches, and so the rounding, of an uninterrupted one.
      batch = range(first, min(first + FLAGS.batch_size, len(requests)))
      missing = set(batch).intersection(results.missing)
      if not missing:
        continue
      scores = score_batch(params, config, sequences, starts, roster, batch)
      for i in sorted(missing):
        found = scores[i - first]
        tokens = sequences[i][starts[i] :]
        results.write(
          i,
          {
            "log_prob": float(found.log_probs[:, 0].sum(dtype=np.float64)),
            "is_greedy": found.greedy_tokens.tolist() == tokens,
            "tokens": tokens,
            "log_probs": found.log_probs[:, 0].tolist(),
          },
        )
      bar.update(len(missing))
  trace_file.write(params, config, roster, sequences)


def main(argv) -> None:
  del argv
  if FLAGS.text is not None and FLAGS.input is not None:
    raise ValueError("--text computes a perplexity and --input scores continuations: use one")
  app.refuse_idle(FLAGS.text is not None, ("trace",), "applies to --input only")
  trace_file.check()
  if FLAGS.batch_size < 1:
    raise ValueError("--batch_size must be at least 1")
  config = app.load_config(FLAGS.checkpoint)
  roster = app.roster_from_flags(config)
  if FLAGS.dry_run:
    app.print_dry_run(
      config, roster, batch_size=FLAGS.batch_size, length=FLAGS.window, scoring=True
    )
    return
  app.refuse_idle(FLAGS.text is None, ("window", "stride"), "applies to --text only")
  tokenizer = app.load_tokenizer(FLAGS.checkpoint)
  # Validate everything else before loading the parameters.
  if FLAGS.text is not None:
    tokens = tokenizer.encode(app.from_first_process(_read_text), FLAGS.special_tokens)
    cut = scoring.windows(config, tokens, FLAGS.window, FLAGS.stride)
    run, sequences = functools.partial(text_perplexity, tokens=tokens, cut=cut), cut.sequences
  else:
    requests, sequences, starts = read_pairs(config, tokenizer)
    settings = {
      "checkpoint": FLAGS.checkpoint,
      "dtype": FLAGS.dtype or config.dtype,
      "roster": roster.settings(),
      "special_tokens": FLAGS.special_tokens,
    }
    results = jsonl.Results(FLAGS.output, requests, settings)
    run = functools.partial(
      continuations, requests=requests, sequences=sequences, starts=starts, results=results
    )
  longest = max(map(len, sequences))
  app.check_memory(config, roster, batch_size=FLAGS.batch_size, length=longest, scoring=True)
  params, config = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
  run(params, config, roster)


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, output=outputs.FILE)


if __name__ == "__main__":
  program()
