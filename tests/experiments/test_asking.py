"""Examples as plain prompts and as chats, and answers read."""

import dataclasses

import chat_formats
import numpy as np
import pytest
import tiny

from experiments import tasks
from experiments.analysis import output_temperatures
from experiments.evaluation import methods
from experiments.evaluation.measurer import Batch, Measurer
from experiments.evaluation.prompts import PromptBuilder
from experiments.tasks import Example
from experiments.tuning import objectives
from roe_jax import decode, scoring
from roe_jax.completion import Completion
from roe_jax.roster import Roster
from roe_jax.text.chat import Chat
from roe_jax.text.tokenizer import Tokenizer, stop_tokens

EXAMPLE = Example(
  id="t/0",
  prompt="Q: 1+1?",
  reference=" It is 2",
  messages=({"role": "user", "content": "What is 1+1?"},),
)


def prompt_builder(folder, name=None, system=None):
  """A small model, its way of being asked in the chat format `name`, and the chat."""
  chat_formats.write(folder, name or "olmoe")
  tokenizer = Tokenizer.load(folder)
  config = tiny.config(
    "olmoe", vocab_size=tokenizer.vocab_size, context_length=256, eos_token_ids=(3,)
  )
  chat = Chat.load(folder, tokenizer) if name else None
  return config, PromptBuilder(config, tokenizer, chat, system), chat


def test_a_plain_prompt_ends_with_its_reference_and_the_end_of_text(tmp_path):
  config, plain, _ = prompt_builder(tmp_path)
  prompt = plain.tokenizer.encode(EXAMPLE.prompt)
  text = plain.tokenizer.encode(" It is 2", add_special_tokens=False)
  assert plain.prompt(EXAMPLE) == prompt and plain.settings == {"chat": None, "system": None}
  assert plain.with_reference(EXAMPLE) == (
    prompt + text + [plain.tokenizer.eos_ids[0]],
    len(prompt),
  )
  assert plain.with_text(EXAMPLE, " It is 2") == (prompt + text, len(prompt))
  read = dataclasses.replace(EXAMPLE, max_new_tokens=0)
  assert plain.with_reference(read) == (prompt + text, len(prompt))
  assert list(plain.stop_tokens) == list(stop_tokens(plain.tokenizer, config))
  assert plain.answer(EXAMPLE, Completion([1], [0.0], [1], "length", "whatever")) == "whatever"


@pytest.mark.parametrize("name", ["olmoe", "thinking"])
def test_a_chat_is_what_its_template_makes_of_the_messages(tmp_path, name):
  config, ours, chat = prompt_builder(tmp_path, name, system="Be brief.")
  prompt = chat.prompt([{"role": "system", "content": "Be brief."}, *EXAMPLE.messages]).tokens
  assert ours.prompt(EXAMPLE) == prompt
  text = ours.tokenizer.encode(" It is 2", add_special_tokens=False)
  # The end of its turn is not scored.
  assert ours.with_reference(EXAMPLE) == (prompt + text, len(prompt))
  assert ours.stop_tokens == (*chat.stop_tokens, *config.eos_token_ids)
  assert ours.settings == {"chat": chat.settings, "system": "Be brief."}


def test_the_answer_is_read_apart_from_the_reasoning(tmp_path):
  _, ours, _ = prompt_builder(tmp_path, "thinking")
  for written, reason, answer in (
    ("<think>17 or 5</think>It is 5<|im_end|>", "stop_token", "It is 5"),
    ("<think>17 or", "length", ""),
  ):
    tokens = ours.tokenizer.encode(written, add_special_tokens=False)
    found = Completion(tokens, [-0.5] * len(tokens), tokens, reason, written)
    assert ours.answer(EXAMPLE, found) == answer


@pytest.mark.slow
def test_comparisons_and_searches_ask_in_the_chat_format(tmp_path):
  config, ours, chat = prompt_builder(tmp_path, "olmoe")
  params = tiny.params(config)
  prompt = chat.prompt(EXAMPLE.messages).tokens
  task = dataclasses.replace(
    tasks.get("wordmath"),
    judge=lambda examples, outputs, workers, done: [
      {"exact_match": float(len(o))} for o in outputs
    ],
  )
  example = dataclasses.replace(EXAMPLE, max_new_tokens=6)
  method = methods.parse("baseline", config, Roster.create(config))
  answers = Measurer(params, ours, 1).answer(method, 0, Batch(task, [example], [3]), [1.0])
  (expected,) = decode.generate(
    params,
    config,
    [prompt],
    max_new_tokens=6,
    stop_tokens=ours.stop_tokens,
    decode=ours.tokenizer.decode,
    request_ids=[3],
  ).completions
  assert answers.sequences == [prompt + expected.tokens] and answers.starts == [len(prompt)]
  assert answers.outputs == [chat.answer(chat.prompt(EXAMPLE.messages), expected).final]
  accuracy = objectives.Accuracy(config, ours, task, [example], [3], 1)
  values, _ = accuracy.measure(params, method.roster, slice(None))
  assert values.tolist() == [float(len(answers.outputs[0]))]
  # And references are scored behind the beginning of the answer.
  perplexity = objectives.Perplexity(config, ours, task, [example], [3], 1)
  text = prompt + ours.tokenizer.encode(" It is 2", add_special_tokens=False)
  log_probs = scoring.score(params, config, [text], [len(prompt)]).sequences[0].log_probs
  found = perplexity.nll(params, method.roster, slice(None))
  np.testing.assert_allclose(found[0, 0], -log_probs.sum(), rtol=1e-5)
  (likelihood,) = Measurer(params, ours, 1).likelihoods(
    method, 0, Batch(task, [example], [3]), output_temperatures.GRID
  )
  assert likelihood.tokens == len(text) - len(prompt)
