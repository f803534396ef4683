"""The harness's adapter against the harness's own model of transformers, and its tasks."""

import importlib.util
import json
import pathlib

import chat_formats
import hf
from lm_eval.api.instance import Instance
import numpy as np
import pytest
import tiny

from experiments import tasks
from experiments.evaluation import lm_eval_model, lm_eval_tasks, methods
from experiments.evaluation.engine import Engine
from experiments.evaluation.measurer import Measurer
from experiments.evaluation.requests import RequestBuilder, request_id
from experiments.records import runs
from experiments.tasks import wordmath, wordmath_tokenizer
from experiments.tuning import objectives
from roe_jax import checkpoint
from roe_jax.checkpoint_folder import CONFIG_FILE
from roe_jax.families import from_hugging_face
from roe_jax.roster import Roster
from roe_jax.text.chat import Chat
from roe_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

CONTEXT = 64
PROBLEMS = wordmath.problems("test", 4)
QUESTIONS = [wordmath.prompt(p) for p in PROBLEMS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The files of a tokenizer."""
  path = tmp_path_factory.mktemp("tokenizer")
  wordmath_tokenizer.save_tokenizer(wordmath_tokenizer.build_tokenizer(num_problems=200), path)
  return path


@pytest.fixture(scope="module")
def model(folder):
  """Names of a random model, and its weights."""
  vocabulary = Tokenizer.load(folder).vocab_size
  config = hf.config_json(
    "olmoe",
    vocab_size=vocabulary,
    max_position_embeddings=CONTEXT,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=1,
  )
  return config, hf.random_state(config)


def adapter(folder, model, batch_size=3, **settings):
  config = from_hugging_face(model[0])
  tokenizer = Tokenizer.load(folder)
  lm = lm_eval_model.RosterLM("name", RequestBuilder(config, tokenizer))
  roster = Roster.create(config, **settings)
  lm.engine = Engine(hf.to_params(*model), config, tokenizer, roster, batch_size)
  return lm


@pytest.fixture(scope="module")
def ours(folder, model):
  return adapter(folder, model)


@pytest.fixture(scope="module")
def theirs(folder, model):
  """The harness's own model of the same weights."""
  for needed in ("torch", "accelerate"):
    pytest.importorskip(needed)
  transformers = pytest.importorskip("transformers")
  from lm_eval.models.huggingface import HFLM

  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
  return HFLM(
    pretrained=hf.to_model(*model),
    tokenizer=tokenizer,
    batch_size=3,
    max_length=CONTEXT,
    device="cpu",
  )


def instances(kind, arguments, task="task"):
  return [Instance(kind, {}, args, i, (task, i, 1)) for i, args in enumerate(arguments)]


def pairs():
  """Contexts and continuations: choices, white space at the seam, none at all, too long ones."""
  made = [(q, f" {choice}") for q in QUESTIONS for choice in ("12+5=17", "12+5=18", "7", "8")]
  made += [
    (QUESTIONS[0] + "  ", "3*4=12"),
    ("", QUESTIONS[1]),
    ("Question: Ann", "'s pears."),
    (" ".join(QUESTIONS), wordmath.completion(PROBLEMS[0])),
    (" ".join(QUESTIONS), " 5"),
  ]
  return made


def test_likelihoods_are_those_of_the_harness_with_transformers(ours, theirs):
  expected = theirs.loglikelihood(instances("loglikelihood", pairs()), disable_tqdm=True)
  # What a model of transformers would say itself, so that some are greedy.
  greedy = theirs.generate_until(
    instances("generate_until", [(q, {"until": [], "max_gen_toks": 3}) for q in QUESTIONS]),
    disable_tqdm=True,
  )
  more = [(q, text) for q, text in zip(QUESTIONS, greedy) if text.strip()]
  expected += theirs.loglikelihood(instances("loglikelihood", more), disable_tqdm=True)
  found = ours.loglikelihood(instances("loglikelihood", pairs() + more))
  np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=1e-4)
  assert [f[1] for f in found] == [e[1] for e in expected]
  assert request_id(" ".join(QUESTIONS)) in ours.builder.truncated


def of_package(folder, name, data):
  """Writes the harness's own definition of a task, with other data."""
  path = pathlib.Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / name
  kept = [l for l in path.read_text().splitlines() if not l.startswith("dataset_")]
  split = "train" if "validation_split: train" in kept else "test"
  source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{{split}: {data}}}}}\n"
  own = "" if any(l.startswith("task:") for l in kept) else f"task: {data.stem}\n"
  (folder / f"{data.stem}.yaml").write_text("\n".join(kept) + "\n" + source + own)


def test_lambada_and_blimp_are_the_tasks_of_the_harness(folder, model, ours, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  roster = adapter(folder, model, num_members=2, temperatures=0.5)
  prompts = [f"{q.rpartition(' ')[0]} {i}" for i in range(3) for q in QUESTIONS]
  wanted = [(p, {"until": [], "max_gen_toks": 1}) for p in prompts]
  next_ones = ours.generate_until(instances("generate_until", wanted))
  words = [t if t[:1] == " " and " " not in t[1:] and t[1:] else " plums" for t in next_ones]
  rows = {
    "lambada_test": [{"text": p + word} for p, word in zip(prompts, words)],
    "blimp": [
      {"sentence_good": f"Ann has {i} pears.", "sentence_bad": f"{q[:20]} has.", "UID": "blimp"}
      for i, q in enumerate(QUESTIONS)
    ],
  }
  for name, some in rows.items():
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
  of_package(tmp_path, "lambada/lambada_openai.yaml", tmp_path / "lambada_test.jsonl")
  of_package(tmp_path, "blimp/_template_yaml", tmp_path / "blimp.jsonl")
  params = hf.to_params(*model)
  for theirs, mine, lm, text in (
    ("lambada_openai", "text/lambada", ours, "baseline"),
    ("blimp", "text/blimp", roster, "roster:n=2,t=0.5"),
  ):
    loaded = lm_eval_tasks.load([theirs], str(tmp_path), include_defaults=False)
    expected = lm_eval_tasks.run(lm, loaded)["results"][theirs]
    task = tasks.get(mine)
    examples = task.examples("all", tmp_path)
    method = methods.parse(text, lm.engine._model[1], Roster.create(lm.engine._model[1]))
    found = Measurer(params, lm.builder, 3).answer(method, 0, task, examples)
    records = [
      {"task": mine, "example": e.id, "seed": 0}
      | {"metrics": m | {"nll": float(l.nll[0]), "tokens": l.tokens}}
      for e, m, l in zip(examples, task.score_all(examples, found.outputs), found.likelihoods)
    ]
    metrics = runs.means(records)[mine]["metrics"]
    objective = objectives.Accuracy(method.config, lm.builder, task, examples, 3)
    right, _ = objective.measure(params, method.with_seed(0), slice(None))
    assert right.tolist() == [r["metrics"]["acc"] for r in records]
    assert metrics["acc"] == expected["acc,none"]
    if mine == "text/lambada":
      assert 0 < metrics["acc"] < 1
      assert metrics["word_perplexity"] == pytest.approx(expected["perplexity,none"], rel=1e-5)
    else:
      scores = [a["log_prob"] for a in roster.answers("", roster.requests[theirs])]
      np.testing.assert_allclose(np.concatenate(found.outputs), scores, atol=1e-5)
      assert len({r.request_id for r in roster.requests[theirs]}) == len(examples)


def test_rolling_likelihoods_are_those_of_the_harness_with_transformers(ours, theirs):
  texts = [(QUESTIONS[0],), (" ".join(QUESTIONS),), ("a",)]
  found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
  expected = theirs.loglikelihood_rolling(
    instances("loglikelihood_rolling", texts), disable_tqdm=True
  )
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert len(ours.builder.windows(*texts[1])) > 2


def test_generated_texts_are_those_of_the_harness_with_transformers(ours, theirs):
  wanted = [(q, {"until": ["\n"], "max_gen_toks": 12}) for q in QUESTIONS]
  plain = theirs.generate_until(instances("generate_until", wanted), disable_tqdm=True)
  stop = plain[1][4]  # a letter that stands in one of the texts
  wanted += [
    (q, {"until": [stop, "\n"], "max_gen_toks": 12, "do_sample": False}) for q in QUESTIONS
  ]
  wanted += [(" ".join(QUESTIONS), {"until": "\n", "max_gen_toks": 40})]
  expected = theirs.generate_until(instances("generate_until", wanted), disable_tqdm=True)
  found = ours.generate_until(instances("generate_until", wanted))
  assert found == expected
  assert found[5] == plain[1][: plain[1].index(stop)]


def test_a_roster_answers_the_same_whatever_the_order_the_batches_and_the_other_requests(
  folder, model, ours
):
  settings = dict(num_members=3, temperatures=0.5)
  made = pairs()
  all_at_once = adapter(folder, model, **settings).loglikelihood(instances("loglikelihood", made))
  some = made[9:2:-1]
  found = adapter(folder, model, batch_size=2, **settings).loglikelihood(
    instances("loglikelihood", some, task="another")
  )
  np.testing.assert_allclose([f[0] for f in found], [f[0] for f in all_at_once[9:2:-1]], atol=1e-4)
  plain = ours.loglikelihood(instances("loglikelihood", made))
  assert max(abs(a[0] - b[0]) for a, b in zip(plain, all_at_once)) > 0.01
  # One request's choices are read off one distribution: the probabilities of all tokens are 1.
  one = adapter(folder, model, **settings)
  tokens = one.tok_encode(QUESTIONS[0])
  wanted = [((QUESTIONS[0], ""), tokens, [i]) for i in range(one.builder.tokenizer.vocab_size)]
  found = one._loglikelihood_tokens(wanted)
  assert sum(np.exp([f[0] for f in found])) == pytest.approx(1, abs=1e-5)


def test_repeats_are_samples_of_their_own_and_equal_questions_are_not(folder, model):
  lm = adapter(folder, model, num_members=2, temperatures=0.5)
  sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
  request, equal = instances("generate_until", [(QUESTIONS[0], sampled)] * 2)
  first, second, other = lm.generate_until([request, request, equal])
  assert first == other != second


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"max_gen_toks": CONTEXT}, "64 new tokens leave no room.*context of 64.*--max_new_tokens"),
    (
      {"penalty_alpha": 0.6},
      "unsupported generation settings penalty_alpha: supported are temperature",
    ),
    ({"num_beams": 4}, "num_beams"),
  ],
)
def test_wrong_generation_settings_are_refused(ours, settings, message):
  with pytest.raises(ValueError, match=message):
    ours.prompt(QUESTIONS[0], {"until": [], **settings})
  assert ours.prompt(QUESTIONS[0], {"num_beams": 1, "max_gen_toks": 5}).max_new_tokens == 5


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "thinking"])
def test_chats_are_prompts_of_the_template_that_end_with_its_turn(tmp_path, name):
  chat_formats.write(tmp_path, name)
  tokenizer = Tokenizer.load(tmp_path)
  config = tiny.config("olmoe", vocab_size=tokenizer.vocab_size, context_length=256)
  (tmp_path / CONFIG_FILE).write_text(config.to_json())
  chat = Chat.load(tmp_path, tokenizer)
  lm = lm_eval_model.RosterLM(str(tmp_path), RequestBuilder(config, tokenizer, chat))
  messages = [{"role": "user", "content": "What is 1+1?"}]
  for said in (messages, [*messages, {"role": "assistant", "content": "It is"}]):
    prompt = lm.prompt(lm.apply_chat_template(said), {"until": ["5"], "max_gen_toks": 9})
    expected = chat.prompt(said)
    assert list(prompt.tokens) == expected.tokens
    assert list(prompt.opening) == expected.opening
    assert prompt.stop_tokens == chat.stop_tokens
  assert lm.chat_template(True) == chat_formats.TEMPLATES[name]
  # Without a chat from the beginning, as the harness's own program asks for it.
  late = lm_eval_model.RosterLM(str(tmp_path), RequestBuilder(config, tokenizer))
  assert late.prompt(late.apply_chat_template(said), {"until": ["5"], "max_gen_toks": 9}) == prompt


def test_the_harnesss_program_finds_the_model_by_name(tiny_checkpoint):
  from lm_eval.api.registry import get_model

  lm = get_model("roe_jax").create_from_arg_string(
    f"checkpoint={tiny_checkpoint},num_members=2,tau=0.5;0.25,gate_weights=noisy",
    {"batch_size": 2, "max_batch_size": None, "device": None},
  )
  assert isinstance(lm, lm_eval_model.RosterLM)
  (found,) = lm.loglikelihood(instances("loglikelihood", [(QUESTIONS[0], " 12")]))
  params, config = checkpoint.load(tiny_checkpoint)
  tokenizer = Tokenizer.load(tiny_checkpoint)
  other = lm_eval_model.RosterLM(str(tiny_checkpoint), RequestBuilder(config, tokenizer))
  roster = Roster.create(config, 2, [0.5, 0.25], gate_weights="noisy")
  other.engine = Engine(params, config, tokenizer, roster, 2)
  assert other.loglikelihood(instances("loglikelihood", [(QUESTIONS[0], " 12")])) == [found]
  with pytest.raises(ValueError, match="unknown model_args temperature: the roster's settings are"):
    get_model("roe_jax").create_from_arg_string(f"checkpoint={tiny_checkpoint},temperature=1")


# Tasks


HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
    train: {data}
test_split: test
training_split: train
fewshot_split: train
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
  "choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  "written": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: digits, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}
""",
  "rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
  "code": """
unsafe_code: true
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: !function code.passed, aggregation: mean, higher_is_better: true}]
""",
  "unconfined": """
unsafe_code: true
output_type: generate_until
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match}]
""",
}
CODE = """
import evaluate
code_eval = evaluate.load("code_eval")

def passed(references, predictions, **kwargs):
  programs = ["def f(): return 7", "def f(): return 8", "import os; os.kill(os.getppid(), 9)"]
  found, _ = code_eval.compute(references=["assert f() == 7"], predictions=[programs], k=[1])
  return found["pass@1"]
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
  """Tasks of the harness with local data, which no network is needed for."""
  path = tmp_path_factory.mktemp("tasks")
  with (path / "data.jsonl").open("w") as file:
    for i, problem in enumerate(wordmath.problems("test", 5)):
      file.write(
        json.dumps(
          {
            "question": wordmath.prompt(problem),
            "choices": ["12", "3+4=7", "9-2=7."],
            "label": i % 3,
            "answer": problem.answer,
          }
        )
        + "\n"
      )
  for name, text in TASKS.items():
    (path / f"{name}.yaml").write_text(HEAD.format(name=name, data=path / "data.jsonl") + text)
  (path / "code.py").write_text(CODE)
  return path


def load(task_folder, *names, **settings):
  return lm_eval_tasks.load(names, str(task_folder), include_defaults=False, **settings)


def test_tasks_of_a_local_folder(task_folder, ours, monkeypatch):
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  loaded = load(task_folder, "choice", "written", "rolling")
  lm_eval_tasks.check(ours, loaded)
  results = lm_eval_tasks.run(ours, loaded, limit=4)
  lines = {
    name: list(lm_eval_tasks.records(ours, name, task, results["samples"][name], seed=7))
    for name, task in loaded["tasks"].items()
  }
  for name, records in lines.items():
    assert [(r["task"], r["example"], r["seed"]) for r in records] == [
      (name, f"{name}/{i}", 7) for i in range(4)
    ]
  for i, record in enumerate(lines["choice"]):
    choices = [" 12", " 3+4=7", " 9-2=7."]
    found = ours.loglikelihood(instances("loglikelihood", [(QUESTIONS[i], c) for c in choices]))
    log_probs = np.array([f[0] for f in found])
    assert record["log_probs"] == log_probs.tolist()
    assert record["metrics"]["acc"] == (np.argmax(log_probs) == i % 3)
    assert record["correct"] == [np.argmax(log_probs) == i % 3]
    assert record["confidences"][0] == pytest.approx(
      np.exp(log_probs.max()) / np.exp(log_probs).sum()
    )
    assert record["metrics"]["nll"] == -log_probs[i % 3]
    assert record["metrics"]["tokens"] == len(ours.tok_encode(choices[i % 3]))
  assert results["results"]["choice"]["acc,none"] == np.mean(
    [r["metrics"]["acc"] for r in lines["choice"]]
  )
  texts = ours.generate_until(
    instances("generate_until", [(q, {"until": ["\n"], "max_gen_toks": 6}) for q in QUESTIONS])
  )
  assert [r["outputs"] for r in lines["written"]] == [[[text]] for text in texts]
  assert lines["written"][0]["metrics"].keys() == {"exact_match,whole", "exact_match,digits"}
  rolling = ours.loglikelihood_rolling(
    instances("loglikelihood_rolling", [(q,) for q in QUESTIONS])
  )
  assert [r["metrics"]["nll"] for r in lines["rolling"]] == [-r for r in rolling]
  assert lines["rolling"][0]["metrics"]["tokens"] == len(ours.tok_encode(QUESTIONS[0]))


def test_examples_are_shown_as_asked_and_do_not_depend_on_the_limit(task_folder, ours):
  loaded = load(task_folder, "choice", num_fewshot=1)
  contexts = []
  for limit in (2, 4):
    for _ in range(2):
      results = lm_eval_tasks.run(ours, loaded, limit=limit)
      contexts.append([s["arguments"][0][0] for s in results["samples"]["choice"]])
  assert contexts[0] == contexts[1] == contexts[2][:2] == contexts[3][:2]
  assert all(context.count("Question:") == 2 for context in contexts[3])


@pytest.mark.parametrize(
  "name, settings, message",
  [
    ("choise", {}, "unknown task 'choise': did you mean choice"),
    ("paper/gsm", dict(others=["paper/gsm8k"]), "did you mean paper/gsm8k"),
    ("code", {}, "task code runs model-written programs.*--allow_code_execution"),
    ("unconfined", {}, "task unconfined runs model-written programs.*--allow_code_execution"),
    ("unconfined", dict(allow_code_execution=True), "without a sandbox.*paper/humaneval"),
  ],
)
def test_wrong_tasks_are_refused(task_folder, name, settings, message):
  with pytest.raises(ValueError, match=message):
    load(task_folder, name, **settings)


def test_data_that_cannot_be_had_are_told(task_folder, tmp_path):
  (tmp_path / "lost.yaml").write_text(
    HEAD.format(name="lost", data=tmp_path / "nowhere.jsonl") + TASKS["choice"]
  )
  with pytest.raises(ValueError, match="task lost cannot be loaded.*--include_path"):
    load(tmp_path, "lost")


def test_a_task_that_asks_for_too_many_tokens_is_refused_before_it_runs(task_folder, ours):
  loaded = load(task_folder, "written")
  loaded["tasks"]["written"].set_config("generation_kwargs", {"max_gen_toks": 64}, update=True)
  with pytest.raises(ValueError, match="task written: 64 new tokens"):
    lm_eval_tasks.check(ours, loaded)


def test_programs_of_the_harnesss_tasks_run_in_the_sandbox(task_folder, ours):
  loaded = load(task_folder, "code", allow_code_execution=True)
  results = lm_eval_tasks.run(ours, loaded, limit=1)
  assert results["results"]["code"]["passed,none"] == pytest.approx(1 / 3)
