"""Examples as raw prompts and as chats, the tokens of pairs, and answers read."""

import dataclasses

import chat_formats
import numpy as np
import pytest
import tiny
import tokenizers

from experiments import tasks
from experiments.evaluation import methods
from experiments.evaluation.engine import Engine
from experiments.evaluation.measurer import Measurer
from experiments.evaluation.requests import RequestBuilder, TaskRequests, request_id
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
  max_new_tokens=64,
  reference=" It is 2",
  messages=({"role": "user", "content": "What is 1+1?"},),
)


TASK = tasks.get("wordmath")


def builder_of(folder, name=None, system=None):
  """A small model, its request builder in the chat format `name`, and the chat."""
  chat_formats.write(folder, name or "olmoe")
  tokenizer = Tokenizer.load(folder)
  config = tiny.config(
    "olmoe", vocab_size=tokenizer.vocab_size, context_length=256, eos_token_ids=(3,)
  )
  chat = Chat.load(folder, tokenizer) if name else None
  return config, RequestBuilder(config, tokenizer, chat, system), chat


def of_example(builder, **changes):
  """The prompt and the reference of the example."""
  asked = TaskRequests.of(builder, TASK, [dataclasses.replace(EXAMPLE, **changes)])
  return next(iter(asked.all_answering), None), asked.references[0]


def test_a_raw_reference_ends_with_the_end_of_text(tmp_path):
  config, plain, _ = builder_of(tmp_path)
  prompt = plain.tokenizer.encode(EXAMPLE.prompt)
  text = plain.tokenizer.encode(" It is 2", add_special_tokens=False)
  asked, reference = of_example(plain)
  assert list(asked.tokens) == prompt and plain.settings == {"chat": None, "system": None}
  assert asked.request_id == reference.request_id == request_id(EXAMPLE.prompt)
  assert list(reference.context) == prompt
  assert list(reference.tokens) == text + [plain.tokenizer.eos_ids[0]]
  asked, reference = of_example(plain, max_new_tokens=0)
  assert asked == reference and list(reference.tokens) == text  # its text is the answer
  assert list(plain.stop_tokens) == list(stop_tokens(plain.tokenizer, config))


@pytest.mark.parametrize("name", ["olmoe", "thinking"])
def test_a_chat_is_what_its_template_makes_of_the_messages(tmp_path, name):
  config, ours, chat = builder_of(tmp_path, name, system="Be brief.")
  messages = [{"role": "system", "content": "Be brief."}, *EXAMPLE.messages]
  asked, reference = of_example(ours)
  assert list(asked.tokens) == chat.prompt(messages).tokens
  assert asked.request_id == reference.request_id == request_id(chat.render(messages))
  # The end of its turn is not scored.
  text = chat.render(messages) + EXAMPLE.reference
  assert list(reference.sequence) == ours.tokenizer.encode(text, add_special_tokens=False)
  assert ours.stop_tokens == (*chat.stop_tokens, *config.eos_token_ids)
  assert ours.settings == {"chat": chat.settings, "system": "Be brief."}


def test_samples_have_addresses_of_their_own_and_choices_do_not(tmp_path):
  _, plain, _ = builder_of(tmp_path)
  asked = TaskRequests.of(plain, TASK, [EXAMPLE] * 2, 3, (0.7, 0, 1.0))
  first, second = asked.answering
  assert first == second and len({p.request_id for p in first}) == 3
  assert {p.sampler for p in first} == {(0.7, 0, 1.0)}
  chosen = dataclasses.replace(EXAMPLE, choices=(" 1", " 2"), target=1)
  (choices,) = TaskRequests.of(plain, TASK, [chosen]).answering
  assert {c.request_id for c in choices} == {first[0].request_id}
  assert list(TaskRequests.of(plain, TASK, [chosen, EXAMPLE]).by_example("abc")) == [
    ["a", "b"],
    ["c"],
  ]


def test_a_continuation_that_merges_with_its_context_is_encoded_apart(tmp_path):
  """As the harness encodes pairs for models with an encoder; its causal models refuse it."""
  raw = tokenizers.Tokenizer(
    tokenizers.models.BPE({"a": 0, "b": 1, " ": 2, "ab": 3, " b": 4}, [("a", "b"), (" ", "b")])
  )
  raw.save(str(tmp_path / "tokenizer.json"))
  config = tiny.config("olmoe", vocab_size=8, context_length=8, eos_token_ids=(7,))
  builder = RequestBuilder(config, Tokenizer.load(tmp_path))
  pair = lambda *texts: (lambda c: (c.context, c.tokens))(builder.continuation(*texts))
  assert pair("ba", "b") == ((1, 0), (1,))
  assert pair("b ", "b") == ((1,), (4,))
  assert pair("ba", "ba") == ((1, 0), (0,))  # as the harness does, also its causal models
  assert pair("", "ab") == pair(" ", "ab")[:1] + ((3,),) == ((7,), (3,))
  with pytest.raises(ValueError, match="has no tokens"):
    builder.continuation("ba", "")
  with pytest.raises(ValueError, match="9 tokens exceeds the model's context of 8"):
    builder.continuation("b", "a" * 9)
  assert not builder.truncated
  assert pair("b" * 9, "a") == ((1,) * 8, (0,)) and builder.truncated == {request_id("b" * 9)}
  kept = [len(builder.prompt("b" * 6, 4, reserve=reserve).tokens) for reserve in (False, True)]
  assert kept == [6, 4] and len(builder.truncated) == 2


@pytest.mark.parametrize(
  "written, reason, answer",
  [
    ("<think>17 or 5</think>It is 5<|im_end|>", "stop_token", "It is 5"),
    ("<think>17", "length", ""),
  ],
)
def test_the_answer_is_read_apart_from_the_reasoning(
  tmp_path, monkeypatch, written, reason, answer
):
  config, ours, _ = builder_of(tmp_path, "thinking")
  tokens = ours.tokenizer.encode(written, add_special_tokens=False)
  found = Completion(tokens, [-0.5] * len(tokens), tokens, reason, written)
  monkeypatch.setattr(decode, "generate", lambda *args, on_finished, **kw: on_finished(0, found))
  engine = Engine(tiny.params(config), config, ours.tokenizer, Roster.create(config))
  (generated,) = engine.answer([of_example(ours)[0]])
  assert generated.text == answer and generated.cost.tokens == len(tokens)


@pytest.mark.slow
def test_comparisons_and_searches_ask_in_the_chat_format(tmp_path):
  config, ours, chat = builder_of(tmp_path, "olmoe")
  params = tiny.params(config)
  prompt = chat.prompt(EXAMPLE.messages).tokens
  task = dataclasses.replace(
    TASK,
    judge=lambda examples, outputs, workers, done: [
      {"exact_match": float(len(o))} for o in outputs
    ],
  )
  example = dataclasses.replace(EXAMPLE, max_new_tokens=6)
  method = methods.parse("baseline", config, Roster.create(config))
  measurer = Measurer(params, ours, 1)
  answers = measurer.answer(method, 0, task, [example])
  (expected,) = decode.generate(
    params,
    config,
    [prompt],
    max_new_tokens=6,
    stop_tokens=ours.stop_tokens,
    decode=ours.tokenizer.decode,
  ).completions
  assert answers.outputs == [chat.answer(chat.prompt(EXAMPLE.messages), expected).final]
  asked = TaskRequests.of(ours, task, [example])
  accuracy = objectives.Accuracy(config, ours, task, [example], 1)
  values, _ = accuracy.measure(params, method.roster, slice(None))
  assert values.tolist() == [float(len(answers.outputs[0]))]
  # And references are scored after the start of the answer.
  perplexity = objectives.Perplexity(config, ours, task, [example], 1)
  reference = asked.references[0]
  start = len(reference.context)
  log_probs = scoring.score(params, config, [reference.sequence], [start]).sequences[0].log_probs
  found, _ = perplexity.nll(params, method.roster, slice(None))
  np.testing.assert_allclose(found[0, 0], -log_probs.sum(), rtol=1e-5)
  (likelihood,) = measurer.likelihoods(method, 0, task, [example], [1.0])
  assert likelihood.nll[0] == pytest.approx(found[0, 0], rel=1e-5)
  assert likelihood.tokens == reference.max_length - start
