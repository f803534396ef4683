"""Builds the Hugging Face tokenizer of the `wordmath` task.

    python -m experiments.tasks.wordmath_tokenizer --output DIR

writes `tokenizer.json` and `tokenizer_config.json`.

The model is a byte-level BPE without merges whose vocabulary holds the two
special tokens, the 256 bytes, and every pre-token (mostly a word with its
leading space) of the training problems. `ignore_merges` makes such a pre-token
one token outright, so none of the intermediate pieces that merges would need
is spent on the embedding table; any other text falls back to its bytes, which
keeps encoding lossless. Digits are always single tokens.
"""

import collections
import pathlib

from absl import app, flags
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from experiments.cli import text_files
from experiments.tasks import wordmath

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MODEL_MAX_LENGTH = 256  # Tokens; the longest problem has about half as many.


def build_tokenizer(num_problems: int = 20000, seed: int = 0) -> tokenizers.Tokenizer:
  """Builds the tokenizer from the first problems of the train split.

  Ids: 0 end of text (also begin of text), 1 padding, then the bytes, then the
  words by falling frequency, ties alphabetically. No special token is added on
  encoding.

  Raises:
    ValueError: if `num_problems` or `seed` is negative.
  """
  pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  counts = collections.Counter()
  for problem in wordmath.problems("train", num_problems, seed):
    text = wordmath.prompt(problem) + wordmath.completion(problem)
    counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text))

  tokens = [END_OF_TEXT, PADDING, *sorted(pre_tokenizers.ByteLevel.alphabet())]
  single = set(tokens)
  words = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  tokens += [word for word, _ in words if word not in single]
  vocabulary = {token: i for i, token in enumerate(tokens)}

  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
  tokenizer.pre_tokenizer = pre_tokenizer
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
  return tokenizer


def save_tokenizer(
  tokenizer: tokenizers.Tokenizer, output: str, max_length: int = MODEL_MAX_LENGTH
) -> None:
  """Writes `tokenizer.json` and its hub-style config into folder `output`."""
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": PADDING,
    "clean_up_tokenization_spaces": False,
    "model_max_length": max_length,
  }
  (folder / "tokenizer_config.json").write_text(
    text_files.to_json(config, indent=2) + "\n", encoding="utf-8"
  )


def define_flags() -> None:
  flags.DEFINE_string("output", None, "Folder to write to.")
  flags.DEFINE_integer("num_problems", 20000, "Training problems from which words are collected.")
  flags.DEFINE_integer("seed", 0, "Seed of those problems.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError("Too many command-line arguments.")
  tokenizer = build_tokenizer(flags.FLAGS.num_problems, flags.FLAGS.seed)
  save_tokenizer(tokenizer, flags.FLAGS.output)

  sample = wordmath.problems("validation", 2000, flags.FLAGS.seed)
  prompts = [len(tokenizer.encode(wordmath.prompt(p)).ids) for p in sample]
  answers = [len(tokenizer.encode(wordmath.completion(p)).ids) for p in sample]
  longest = max(map(sum, zip(prompts, answers)))
  print(f"vocabulary: {tokenizer.get_vocab_size()} tokens")
  print(f"mean tokens of a prompt: {sum(prompts) / len(sample):.1f}")
  print(f"mean tokens of a completion: {sum(answers) / len(sample):.1f}")
  print(f"longest problem: {longest} tokens")


if __name__ == "__main__":
  define_flags()
  flags.mark_flag_as_required("output")
  app.run(main)
