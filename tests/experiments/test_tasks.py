"""The tasks on a few rows of our own, in each of the public formats."""

import dataclasses
import gzip
import json
import re
import sys
import types

import pytest

from experiments import tasks
from experiments.tasks import base, llm_adapters, task_data

MATH = ("gsm8k", "svamp", "addsub", "singleeq", "multiarith")
COMMONSENSE = (
  *("arc_easy", "arc_challenge", "obqa", "siqa", "hellaswag"),
  *("piqa", "winogrande", "boolq"),
)
TRAINED = ("arc_easy", "arc_challenge", "obqa", "piqa", "winogrande", "boolq")
FOLDERS = dict(
  zip(
    MATH + COMMONSENSE,
    (
      "gsm8k",
      "SVAMP",
      "AddSub",
      "SingleEq",
      "MultiArith",
      "ARC-Easy",
      "ARC-Challenge",
      "openbookqa",
      "social_i_qa",
      "hellaswag",
      "piqa",
      "winogrande",
      "boolq",
    ),
  )
)


def choice(question, word="answer", target=2):
  return {
    "instruction": f"Please choose the correct answer to the question: {question}\n\n"
    f"{word.capitalize()}1: yes {word.capitalize()}2: no\n\n"
    f"Answer format: {word}1/{word}2",
    "input": "",
    "output": "",
    "answer": f"{word}{target}",
  }


WORDS = {"hellaswag": "ending", "piqa": "solution", "winogrande": "option"}


def number(question, answer="12.0"):
  return {"instruction": question, "input": "", "output": "wrong", "answer": answer}


@pytest.fixture
def data_dir(tmp_path):
  """Files of all tasks of LLM-Adapters, and GSM8K's training problems."""
  for name, folder in FOLDERS.items():
    target = tmp_path / "dataset" / folder
    target.mkdir(parents=True)
    word = WORDS.get(name, "answer")
    rows = [number(f"Ann has {i} pears of {name}. How many?", str(float(i))) for i in range(40)]
    if name in COMMONSENSE:
      rows = [choice(f"Is {i} a number of {name}?", word, 1 + i % 2) for i in range(400)]
    (target / "test.json").write_text(json.dumps(rows))
    if name in TRAINED:
      rows = [choice(f"Is {i} a training number of {name}?", word) for i in range(5)]
      rows.append(choice(f"is 7 a number of {name}", word))  # as in the test, but for its signs
      (target / "train.json").write_text(json.dumps(rows))
  solutions = [
    {
      "question": f"Ben has {i} plums and 2 more. How many?",
      "answer": f"He has {i}+2=<<{i}+2={i + 2}>>{i + 2}.\n#### {1000 + i:,}",
    }
    for i in range(5)
  ]
  solutions.append({"question": "Ann has 3 pears of svamp.  How many?", "answer": "#### 3"})
  (tmp_path / "gsm8k").mkdir()
  (tmp_path / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(s) + "\n" for s in solutions))
  return tmp_path


def test_the_twelve_tasks_of_the_paper_and_ours_are_there():
  assert list(tasks.TASKS) == [
    "wordmath",
    "wordmath_sums",
    "wordmath_products",
    "wordmath_quotients",
    "wordmath_choice",
    *(
      base.PAPER + name
      for name in (*MATH, *COMMONSENSE, "humaneval", "humaneval_plus", "wikitext103")
    ),
    *("text/lambada", "text/blimp", "text/wikitext2", "text/wikitext103"),
  ]
  for name, task in tasks.TASKS.items():
    assert task.name == name and task.category in base.CATEGORIES
    assert task.higher_is_better == ("wikitext" not in name)
    assert task.runs_code == (task.category == "code") and len(task.validation) > 20
  assert {(t.category, t.metric) for t in tasks.TASKS.values()} == {
    ("math", "exact_match"),
    ("math", "acc"),
    ("commonsense", "acc"),
    ("code", "pass@1"),
    ("language", "perplexity"),
    ("language", "acc"),
  }


def test_an_unknown_task_is_refused_with_those_that_there_are():
  with pytest.raises(
    ValueError, match="unknown task 'gsm9k': choose from wordmath, wordmath_sums, "
  ):
    tasks.get("gsm9k")
  with pytest.raises(ValueError, match="'gsm8k' is that of lm-evaluation-harness.*paper/gsm8k"):
    tasks.get("gsm8k")
  with pytest.raises(ValueError, match="'blimp' is that of lm-evaluation-harness.*text/blimp"):
    tasks.get("blimp")


def test_the_prompt_has_the_white_space_of_llm_adapters():
  lines = llm_adapters.wrap("What is 1+1?").split("\n")
  indent = " " * 16
  assert lines == [
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request. ",
    "",
    indent + "### Instruction:",
    indent + "What is 1+1?",
    "",
    indent + "### Response:",
    indent,
  ]


@pytest.mark.parametrize(
  "text,expected",
  [
    ("The answer is 18.", 18.0),
    ("It is $1,234.50 in all", 1234.5),
    ("2+3=5, so -7", -7.0),
    ("3 of them, and then 4 of 5", 5.0),
    ("none", None),
    ("", None),
    ("5-3", -3.0),
    ("10 %.", 10.0),
  ],
)
def test_the_last_number_is_the_answer(text, expected):
  assert llm_adapters.extract_number(text) == expected


@pytest.mark.parametrize(
  "text,expected",
  [
    ("the correct answer is answer3", "answer3"),
    ("answer1 or answer2", "answer1"),
    ("ending4.", "ending4"),
    ("Answer 2", None),
    ("answer6", None),
    ("", None),
  ],
)
def test_the_first_choice_named_is_the_answer(text, expected):
  assert llm_adapters.extract_choice(text) == expected


@pytest.mark.parametrize(
  "label,text,correct",
  [
    ("0.6666666666666666", "0.667", 1.0),
    ("0.6666666666666666", "0.668", 0.0),
    ("576.0", "so 576", 1.0),
    ("4", "4.0", 1.0),
    ("4", "5", 0.0),
    ("4", "no idea", 0.0),
  ],
)
def test_numbers_are_right_within_a_thousandth(data_dir, label, text, correct):
  (data_dir / "dataset/AddSub/test.json").write_text(json.dumps([number("How many?", label)]))
  task = tasks.get("paper/addsub")
  (example,) = task.examples("test", data_dir)
  assert task.score(example, text) == {"exact_match": correct}


def test_a_math_example_is_a_text_to_write(data_dir):
  example = tasks.get("paper/gsm8k").examples("test", data_dir, limit=1)[0]
  assert example.kind == "generate" and example.prompt == llm_adapters.wrap(
    "Ann has 0 pears of gsm8k. How many?"
  )
  assert example.target == 0.0 and example.max_new_tokens == 256
  assert example.reference is None  # what LLM-Adapters has there is a model's, often wrong


def test_a_commonsense_example_is_a_choice_by_probability(data_dir):
  task = tasks.get("paper/hellaswag")
  example = task.examples("all", data_dir)[1]
  assert example.kind == "choose" and example.target == 1
  assert example.choices == ("the correct answer is ending1", "the correct answer is ending2")
  assert example.reference == example.choices[1]
  assert task.score(example, [-1.5, -1.0]) == {"acc": 1.0, "acc_norm": 1.0}
  assert task.score(example, [-1.0, -1.5]) == {"acc": 0.0, "acc_norm": 0.0}
  assert task.score(example, "I think ending2 it is, not ending1") == {"acc": 1.0}
  assert task.score(example, "the correct answer is ending1") == {"acc": 0.0}


def test_lengths_matter_to_the_normalized_accuracy_only_and_ties_go_to_the_first():
  example = base.Example(id="a", prompt="", choices=("é", "abcd", "xy"), target=1)
  assert base.chosen(example, [-3.0, -4.0, -3.5]) == {"acc": 0.0, "acc_norm": 1.0}
  assert base.chosen(dataclasses.replace(example, target=0), [-3.0, -9.0, -3.0])["acc"] == 1.0


def test_the_last_word_is_read_and_right_if_greedy(tmp_path):
  (tmp_path / "lambada_test.jsonl").write_text(
    3 * (json.dumps({"text": 'He waved.\n\n"Not now,"  replied Helen'}) + "\n")
  )
  (tmp_path / "lambada_development_plain_text.txt").write_text(
    "`` do n't , '' she said ( twice ) , ` it 's sparhawk 's - own - mat ; is n't it ? ' he wins\n"
  )
  task = tasks.get("text/lambada")
  first, *copies = task.examples("test", tmp_path)
  assert first.kind == "read" and first.prompt == 'He waved.\n\n"Not now,"  replied'
  assert first.reference == " Helen" and len({first.id, *(c.id for c in copies)}) == 3
  assert task.score(first, True) == {"acc": 1.0, "words": 1.0}
  assert task.score(first, False)["acc"] == 0.0
  with pytest.raises(ValueError, match="must be a bool, got str"):
    task.score(first, "Helen")
  (shown,) = task.examples("validation", tmp_path)
  assert shown.prompt + shown.reference == (
    "\"don't,\" she said (twice), 'it's sparhawk's-own-mat; isn't it?' he wins"
  )


@pytest.mark.parametrize("joined", [False, True])
def test_minimal_pairs_take_turns_between_paradigms(tmp_path, joined):
  rows = {
    uid: [
      {"sentence_good": f"Good {uid} {i}.", "sentence_bad": f"Bad {uid} {i}.", "UID": uid}
      for i in range(40)
    ]
    for uid in ("island", "passive")
  }
  (tmp_path / "blimp").mkdir()
  written = {"all": rows["island"] + rows["passive"]} if joined else rows
  for name, some in written.items():
    (tmp_path / f"blimp/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
  split = {s: tasks.get("text/blimp").examples(s, tmp_path) for s in base.SPLITS}
  assert [e.id for e in split["all"][:3]] == ["blimp/island/0", "blimp/passive/0", "blimp/island/1"]
  assert split["all"][1].choices == (" Good passive 0.", " Bad passive 0.")
  assert {e.id for e in split["all"]} == {e.id for s in ("test", "validation") for e in split[s]}
  assert len(split["all"]) == 80 == len(split["test"]) + len(split["validation"])
  assert 0 < len(split["validation"]) < 20
  assert tasks.get("text/blimp").score(split["all"][0], [-1.0, -2.0])["acc"] == 1.0


def test_outputs_of_the_wrong_kind_are_refused(data_dir):
  task = tasks.get("paper/siqa")
  example = task.examples("test", data_dir, limit=1)[0]
  with pytest.raises(ValueError, match="must be 2 log-probabilities, one per choice, got 3"):
    task.score(example, [-1.0, -2.0, -3.0])
  task = tasks.get("paper/gsm8k")
  with pytest.raises(ValueError, match="must be a string, got list"):
    task.score(task.examples("test", data_dir, limit=1)[0], [-1.0])
  with pytest.raises(ValueError, match="shorter"):
    task.score_all(task.examples("test", data_dir, limit=2), ["one"])


def test_a_chat_gets_the_bare_instruction(data_dir):
  for name in MATH + COMMONSENSE:
    plain = tasks.get(base.PAPER + name).examples("test", data_dir, limit=2)[1]
    chat = tasks.get(base.PAPER + name).examples("test", data_dir, limit=2, chat=True)[1]
    (message,) = chat.messages
    assert message["role"] == "user" and plain.messages == ()
    assert llm_adapters.wrap(message["content"]) == plain.prompt
    assert dataclasses.replace(chat, messages=()) == plain


@pytest.mark.parametrize("name", MATH + COMMONSENSE)
def test_validation_and_test_have_no_question_in_common(name, data_dir):
  split = {
    s: tasks.get(base.PAPER + name).examples(s, data_dir) for s in ("validation", "test", "all")
  }
  words = {
    s: {task_data.content(e.data["instruction"]) for e in found} for s, found in split.items()
  }
  assert words["validation"] and not words["validation"] & words["test"]
  ids = {s: [e.id for e in found] for s, found in split.items()}
  assert all(len(set(found)) == len(found) for found in ids.values())
  if name in ("siqa", "hellaswag"):
    assert sorted(ids["validation"] + ids["test"]) == sorted(ids["all"])
    share = llm_adapters.SIQA_SLICE if name == "siqa" else llm_adapters.HELLASWAG_SLICE
    assert len(ids["validation"]) == pytest.approx(400 * share, abs=25)
  else:
    assert ids["test"] == ids["all"] and not set(ids["validation"]) & set(ids["test"])
    # GSM8K has one of SVAMP's questions here, and the others one of their own.
    assert len(ids["validation"]) == (5 if name in ("svamp", *COMMONSENSE) else 6)


def test_copies_of_a_question_are_kept_on_one_side_with_names_of_their_own(data_dir):
  rows = [choice(f"Is {i % 100} odd?") for i in range(200)]
  (data_dir / "dataset/social_i_qa/test.json").write_text(json.dumps(rows))
  validation, test = (tasks.get("paper/siqa").examples(s, data_dir) for s in ("validation", "test"))
  for examples in (validation, test):
    ids = [e.id for e in examples]
    assert len(set(ids)) == len(ids)
    assert {i for i in ids if i.endswith("-2")} == {f"{i}-2" for i in ids if not i.endswith("-2")}
  assert len(validation) + len(test) == 200


def test_names_of_examples_do_not_depend_on_order_or_limit(data_dir):
  task, file = tasks.get("paper/multiarith"), data_dir / "dataset/MultiArith/test.json"
  before = {e.id: e.prompt for e in task.examples("test", data_dir)}
  file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
  assert {e.id: e.prompt for e in task.examples("test", data_dir)} == before
  first = task.examples("test", data_dir, limit=3)
  assert len(first) == 3 and all(before[e.id] == e.prompt for e in first)


def test_gsm8ks_human_solutions_are_the_references_and_right(data_dir):
  task = tasks.get("paper/gsm8k")
  examples = task.examples("validation", data_dir)
  assert examples[1].reference == "He has 1+2=3.\n#### 1,001" and examples[1].target == 1001.0
  assert all(task.score(e, e.reference) == {"exact_match": 1.0} for e in examples)


QUESTION = {
  "llm_adapters": number("Tim had 2 cats. He got 3. How many?", "5"),
  "gsm8k": {"question": "Tim had 2 cats. He got 3. How many?", "answer": "2+3=5\n#### 5"},
  "svamp": {"Body": "Tim had 2 cats. He got 3", "Question": "How many?", "Answer": 5.0},
  "svamp with its stop": {
    "Body": "Tim had 2 cats. He got 3. ",
    "Question": "How many?",
    "Answer": 5,
  },
  "mawps": {"sQuestion": "Tim had 2 cats. He got 3. How many?", "lSolutions": [5.0]},
  "multiarith": {"question": "Tim had 2 cats. He got 3. How many?", "final_ans": "5"},
}


@pytest.mark.parametrize("form", QUESTION)
def test_all_forms_of_word_problems_read_the_same(form):
  question = llm_adapters.read_math(QUESTION[form])
  assert question.instruction == "Tim had 2 cats. He got 3. How many?" and question.target == 5.0


ASKED = (
  "Please choose the correct answer to the question: Which is red?\n\nAnswer1: grass "
  "Answer2: blood Answer3: snow\n\nAnswer format: answer1/answer2/answer3"
)
LISTED = [{"text": t, "label": l} for t, l in zip(("grass", "blood", "snow"), "ABC")]
HUB = {"text": ["grass", "blood", "snow"], "label": ["1", "2", "3"]}
CHOICE = {
  "llm_adapters": {"instruction": ASKED, "answer": "answer2"},
  "arc": {"question": {"stem": "Which is red?", "choices": LISTED}, "answerKey": "B"},
  "arc of the hub": {"question": "Which is red?", "choices": HUB, "answerKey": "2"},
  "obqa of the hub": {"question_stem": "Which is red?", "choices": HUB, "answerKey": "2"},
  "siqa": {
    "context": "Which",
    "question": "is red?",
    "answerA": "grass",
    "answerB": "blood",
    "answerC": "snow",
    "label": "2",
  },
}


@pytest.mark.parametrize("form", CHOICE)
def test_all_forms_of_choices_read_the_same(form):
  question = llm_adapters.read_choice(CHOICE[form])
  assert question == llm_adapters.Question(ASKED, 1, ("answer1", "answer2", "answer3"))


PUBLISHED = [  # an original row, and the instruction and answer that LLM-Adapters publishes for it
  (
    {
      "goal": "Retain study notes in brain.",
      "sol1": "Go over notes one last time one week before test.",
      "sol2": "Go over notes one last time one day before test.",
      "label": 1,
    },
    "Please choose the correct solution to the question: Retain study notes in brain.\n\n"
    "Solution1: Go over notes one last time one week before test.\n\nSolution2: Go over notes one "
    "last time one day before test.\n\nAnswer format: solution1/solution2",
    "solution2",
  ),
  (
    {
      "sentence": "The jeans fit worse than the shirt because I had tried the _ on at the store.",
      "option1": "jeans",
      "option2": "shirt",
      "answer": "2",
    },
    "Please choose the correct answer to fill in the blank to complete the given sentence: The "
    "jeans fit worse than the shirt because I had tried the _ on at the store.\n\nOption1: jeans "
    "Option2: shirt Answer format: option1/option2",
    "option2",
  ),
  (
    {
      "question": "is i cant believe its not butter margarine",
      "passage": "I Can't Believe It's Not Butter! is a spread.",
      "answer": False,
    },
    "Please answer the following question with true or false, question: is i cant believe its not "
    "butter margarine?\n\nAnswer format: true/false",
    "false",
  ),
]


@pytest.mark.parametrize("row,instruction,answer", PUBLISHED)
def test_originals_read_as_in_llm_adapters(row, instruction, answer):
  question = llm_adapters.read_choice(row)
  assert question.instruction == instruction and question.names[question.target] == answer
  assert question == llm_adapters.read_choice({"instruction": instruction, "answer": answer})
  wrong, right = question.names
  assert llm_adapters.extract_choice(f"it is {right}, not {wrong}", question.names) == right
  assert llm_adapters.extract_choice("answer1", question.names) is None


def test_hellaswag_reads_as_in_llm_adapters():
  question = llm_adapters.read_choice(
    {
      "activity_label": "Cooking",
      "ctx": "[header] Eggs [step] He",
      "label": "1",
      "endings": ["sleeps.", "cooks."],
    }
  )
  assert question == llm_adapters.Question(
    "Please choose the correct ending to complete the given sentence: Cooking: [header] Eggs "
    "[step] He\n\nEnding1: sleeps. Ending2: cooks.\n\nAnswer format: ending1/ending2",
    1,
    ("ending1", "ending2"),
  )


@pytest.mark.parametrize(
  "row",
  [
    {},
    {"question": "?", "answer": "no mark"},
    {"instruction": "?", "answer": "many"},
    {"sQuestion": "?", "lSolutions": []},
    {"instruction": "?", "answer": "nan"},
  ],
)
def test_rows_that_are_no_word_problems_are_shown(data_dir, row):
  rows = [number("How many?", "1"), row]
  (data_dir / "dataset/SingleEq/test.json").write_text(json.dumps(rows))
  with pytest.raises(ValueError, match="row 1 of singleeq/test has an unknown format"):
    tasks.get("paper/singleeq").examples("test", data_dir)


@pytest.mark.parametrize(
  "row",
  [
    {},
    {"instruction": "Which?", "answer": "answer1"},
    choice("?") | {"answer": "answer3"},
    CHOICE["siqa"] | {"label": "4"},
    CHOICE["siqa"] | {"label": ""},
    CHOICE["arc"] | {"answerKey": "D"},
  ],
)
def test_rows_that_are_no_choices_are_shown(data_dir, row):
  (data_dir / "dataset/ARC-Easy/test.json").write_text(json.dumps([row]))
  with pytest.raises(ValueError, match="row 0 of arc_easy/test has an unknown format"):
    tasks.get("paper/arc_easy").examples("test", data_dir)


def test_files_are_found_in_all_their_public_names_and_packings(tmp_path):
  line = json.dumps(CHOICE["arc"]) + "\n"
  (tmp_path / "ARC-V1").mkdir()
  (tmp_path / "ARC-V1" / "ARC-Easy-Test.jsonl").write_text(line + "\n" + line)
  assert len(tasks.get("paper/arc_easy").examples("test", tmp_path)) == 2
  (tmp_path / "SVAMP.json").write_text(json.dumps([QUESTION["svamp"]]))
  assert len(tasks.get("paper/svamp").examples("test", str(tmp_path))) == 1
  with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
    file.write(line)
  assert task_data.read(tmp_path / "rows.jsonl.gz") == [CHOICE["arc"]]


def test_missing_data_are_named(tmp_path, data_dir):
  (data_dir / "dataset/SVAMP/test.json").unlink()
  with pytest.raises(
    FileNotFoundError,
    match=r"no data of svamp/test in or below .*: expected a file SVAMP/test.json or SVAMP.json",
  ):
    tasks.get("paper/svamp").examples("test", data_dir)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    tasks.get("paper/svamp").examples("test", tmp_path / "nowhere")


@pytest.mark.parametrize(
  "content", ["", "[", "{}", "[]", "[1]", '{"a": 1}\n{"b": 2}\n', "[" * 10**5]
)
def test_broken_files_are_refused(data_dir, content):
  (data_dir / "dataset/AddSub/test.json").write_text(content)
  with pytest.raises(
    ValueError, match="AddSub/test.json (cannot be read|must contain JSON objects)"
  ):
    tasks.get("paper/addsub").examples("test", data_dir)


def test_unknown_splits_and_limits_are_refused(data_dir):
  with pytest.raises(ValueError, match="must be one of validation, test, all, got 'train'"):
    tasks.get("paper/gsm8k").examples("train", data_dir)
  with pytest.raises(ValueError, match="must be at least 1, got 0"):
    tasks.get("paper/gsm8k").examples("test", data_dir, limit=0)


def test_data_come_from_the_hub_by_name(monkeypatch):
  asked = []

  def load_dataset(**arguments):
    asked.append(arguments)
    return [{"question": f"{arguments['split']}?", "final_ans": "5"}]

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  examples = tasks.get("paper/multiarith").examples("test")
  assert asked == [
    {"path": "ChilleD/MultiArith", "split": "train"},
    {"path": "ChilleD/MultiArith", "split": "test"},
  ]
  assert [e.data["instruction"] for e in examples] == ["train?", "test?"]


def test_a_hub_out_of_reach_is_said_with_what_helps(monkeypatch):
  def load_dataset(**arguments):
    raise ConnectionError("no network")

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  with pytest.raises(
    ValueError, match="addsub/test could not be read from json on the hub .*no network.*--data_dir"
  ):
    tasks.get("paper/addsub").examples("test")
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ValueError, match="requires the package datasets"):
    tasks.get("paper/siqa").examples("test")


def test_every_task_names_public_sources():
  for name in MATH + COMMONSENSE:
    source = tasks.get(base.PAPER + name).read.args[2]
    assert any(file.endswith(".json") for file in source.files) and source.hub
    for arguments in source.hub:
      assert re.fullmatch(r"[\w-]+/[\w-]+|json", arguments["path"])


def test_a_slice_has_its_share_and_follows_from_the_key_alone():
  keys = [f"key {i}" for i in range(4000)]
  inside = [k for k in keys if task_data.in_slice(k, 0.25)]
  assert len(inside) == pytest.approx(1000, abs=4 * (4000 * 0.25 * 0.75) ** 0.5)
  assert set(inside) <= {k for k in keys if task_data.in_slice(k, 0.5)}


def test_wordmath_is_a_task_like_the_others():
  task = tasks.get("wordmath")
  validation, test = task.examples("validation", limit=50), task.examples("test", limit=50)
  assert not {e.data["content"] for e in validation} & {e.data["content"] for e in test}
  assert task.examples("all", limit=50) == test
  for example in validation + test:
    assert task.score(example, example.reference) == {"exact_match": 1.0}
    assert task.score(example, example.reference + "0") == {"exact_match": 0.0}


def test_kinds_of_wordmath_part_its_problems():
  whole = tasks.get("wordmath").examples("test", limit=60)
  kinds = {
    kind: {e.prompt for e in tasks.get(f"wordmath_{kind}").examples("test", limit=60)}
    for kind in ("sums", "products", "quotients")
  }
  for example in whole:
    operators = set(re.findall(r"[-+*/](?=\d+=)", example.reference))
    kind = "quotients" if "/" in operators else "products" if "*" in operators else "sums"
    assert [k for k, prompts in kinds.items() if example.prompt in prompts] == [kind]


def test_a_choice_of_wordmath_has_one_right_result_among_four():
  examples = tasks.get("wordmath_choice").examples("validation", limit=200)
  for e in examples:
    results = [int(c.partition(".")[0]) for c in e.choices]
    expression = re.search(r"(\d+)([-+*/])(\d+)=$", e.prompt)
    left, right = int(expression[1]), int(expression[3])
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[
      expression[2]
    ]
    assert results.index(value) == e.target and len(set(results)) == 4 and min(results) > 0
    assert tasks.get("wordmath_choice").score(e, e.choices[e.target]) == {"acc": 1.0}
    assert tasks.get("wordmath_choice").score(e, e.choices[e.target - 1]) == {"acc": 0.0}
  assert {e.target for e in examples} == {0, 1, 2, 3}


def test_wikitext_is_cut_at_paragraphs_and_articles(tmp_path):
  paragraphs = [f" {'word ' * 300}{i} . \n" for i in range(7)]
  lines = [
    " \n",
    " = First = \n",
    " \n",
    *paragraphs[:5],
    " = Second article = \n",
    *paragraphs[5:],
  ]
  folder = tmp_path / "wikitext-103-raw"
  folder.mkdir()
  (folder / "wiki.valid.raw").write_text("".join(lines))
  examples = tasks.get("paper/wikitext103").examples("validation", tmp_path)
  # 1500 characters each: two in a piece, but for the last of an article.
  assert [[int(w) for w in (e.prompt + e.reference).split() if w.isdigit()] for e in examples] == [
    [0, 1],
    [2, 3],
    [4],
    [5, 6],
  ]
  for e in examples:
    assert e.kind == "read" and e.reference.startswith(" ") and 200 <= len(e.prompt) < 210
  assert examples[3].prompt.startswith("= Second article =")
  with pytest.raises(ValueError, match="has no chat form"):
    tasks.get("paper/wikitext103").examples("validation", tmp_path, chat=True)


def test_windows_of_wikitext_have_each_character_of_an_article_once(tmp_path):
  first = "= First =\n" + "".join(f" word {i} ." for i in range(600))
  second = "= Second =\n short ."
  folder = tmp_path / "wikitext-2-raw"
  folder.mkdir()
  (folder / "wiki.test.raw").write_text(f" \n {first} \n \n {second} \n \n")
  examples = tasks.get("text/wikitext2").examples("test", tmp_path)
  assert "".join(e.reference for e in examples[:-1]) == first
  assert (examples[-1].prompt, examples[-1].reference) == ("", second)
  before = ""
  for e in examples[:-1]:
    assert e.prompt == before[-2000:] and len(e.reference) <= 2010
    before += e.reference
  task = tasks.get("text/wikitext2")
  assert task.score(examples[-1], False) == {"words": 5.0}
