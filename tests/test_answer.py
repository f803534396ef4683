import chat_formats
import numpy as np
import pytest
import tiny

from roe_jax import stopping
from roe_jax.completion import Completion
from roe_jax.text import answer as answer_lib
from roe_jax.text.answer import Answer
from roe_jax.text.tokenizer import Tokenizer


@pytest.fixture(params=list(chat_formats.TEMPLATES))
def any_tokenizer(request, tmp_path):
  return load(request.param, tmp_path)


def load(name, folder):
  return Tokenizer.load(chat_formats.write(folder, name))


def spelled(tokenizer, text):
  """The bytes of a text, marks in it included."""
  return [i for c in text for i in tokenizer.encode(c, add_special_tokens=False)]


def tokens(tokenizer, *parts):
  """Marks of the format in text; what is in a list is only spelled out."""
  return [
    i
    for part in parts
    for i in (
      spelled(tokenizer, part[0])
      if isinstance(part, list)
      else tokenizer.encode(part, add_special_tokens=False)
    )
  ]


def read(tokenizer, *parts, opening="", reason="length", **settings):
  ids = tokens(tokenizer, *parts)
  completion = Completion(ids, [0.0] * len(ids), [-1] * len(ids), reason)
  return answer_lib.read(tokenizer, completion, opening=tokens(tokenizer, opening), **settings)


START = "<|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
HARMONY = {  # opening, what was generated, answer
  "whole": (
    START,
    [ANALYSIS + "2 and 2<|end|>" + START + FINAL + "It is 4.<|return|>"],
    Answer("It is 4.", "2 and 2"),
  ),
  "final only": (START, [FINAL + "4<|return|>"], Answer("4", "")),
  "cut in the final channel": (
    START,
    [ANALYSIS + "2<|end|>" + START + FINAL + "It i"],
    Answer("It i", "2"),
  ),
  "final channel opened and nothing in it": (START, [FINAL], Answer("", "")),
  "cut in the name of the channel": (
    START,
    [ANALYSIS + "so 4<|end|>" + START + "<|channel|>final"],
    Answer(None, "so 4"),
  ),
  "cut in analysis": (START, [ANALYSIS + "the final 5"], Answer(None, "the final 5")),
  "cut in the role": (START, [ANALYSIS + "a<|end|><|start|>assi"], Answer(None, "a")),
  "nothing": (START, [], Answer(None, "")),
  "a preamble and a tool before": (
    START,
    [
      "<|channel|>commentary<|message|>I look.<|end|>"
      + START
      + ANALYSIS
      + "hm<|end|>"
      + START
      + "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
      + "<|start|>functions.f to=assistant<|channel|>commentary<|message|>7<|end|>"
      + START
      + FINAL
      + "7<|return|>"
    ],
    Answer("7", "I look.\nhm\n{}\n7"),
  ),
  "ended by a call": (
    START,
    ["<|channel|>commentary to=f<|message|>{}<|call|>"],
    Answer(None, "{}"),
  ),
  "constrained": (
    START,
    [FINAL.replace("final", "final <|constrain|>json") + "{}<|return|>"],
    Answer("{}", ""),
  ),
  "constrained at once": (
    START,
    [FINAL.replace("final", "final<|constrain|>json") + "{}<|return|>"],
    Answer("{}", ""),
  ),
  "a channel without a name": (START, ["<|channel|><|message|>4<|end|>"], Answer("4", "")),
  "marks that are only spelled out": (
    START,
    [
      ANALYSIS + "a",
      ["<|end|><|start|>assistant<|channel|>final<|message|>5"],
      "<|end|>" + START + FINAL + "say ",
      ["<|channel|>"],
      "!<|return|>",
    ],
    Answer("say <|channel|>!", "a<|end|><|start|>assistant<|channel|>final<|message|>5"),
  ),
  "a message without a channel": (START, ["<|message|>4<|end|>"], Answer("4", "")),
  "text before any mark": (START, ["4, as I"], Answer("4, as I", "")),
  "text after analysis": (
    START,
    [ANALYSIS + "hm<|end|>It is 4.<|return|>"],
    Answer("It is 4.", "hm"),
  ),
  "text in place of a channel": (
    START,
    [ANALYSIS + "hm<|end|>" + START + "\nIt is 4.<|return|>"],
    Answer("\nIt is 4.", "hm"),
  ),
  "text before the final channel": (START, ["Well, " + FINAL + "4"], Answer("4", "Well, ")),
  "a recipient before any mark": (START, [" to=functions.f"], Answer(None, "")),
  "another role": (START, [FINAL[:0] + "<|start|>user<|message|>5<|end|>"], Answer(None, "5")),
  "opened for analysis by the prompt": (
    START + ANALYSIS,
    ["so<|end|>" + START + FINAL + "4"],
    Answer("4", "so"),
  ),
  "the prompt holds the beginning": (START + FINAL + "It is", [" 4.<|return|>"], Answer(" 4.", "")),
  "the prompt opened a channel's name": (
    START + "<|channel|>",
    ["final<|message|>4"],
    Answer("4", ""),
  ),
}


@pytest.mark.parametrize("case", HARMONY)
def test_the_final_channel_is_the_answer(case, tmp_path):
  opening, parts, expected = HARMONY[case]
  tokenizer = load("harmony", tmp_path)
  assert read(tokenizer, *parts, opening=opening) == expected


BEGIN = "<|im_start|>assistant\n"
THINKING = {
  "whole": (BEGIN, ["<think>\n2 and 2\n</think>\n\nIt is 4.\n"], Answer("It is 4.\n", "2 and 2")),
  "not finished": (BEGIN, ["<think>\nIt is 5, no, 4"], Answer(None, "It is 5, no, 4")),
  "just finished": (BEGIN, ["<think>a</think>"], Answer("", "a")),
  "no thoughts": (BEGIN, ["It is 4."], Answer("It is 4.", "")),
  "opened by the prompt": (BEGIN + "<think>\n", ["hm\n</think>\n\n4"], Answer("4", "hm")),
  "opened by the prompt, not finished": (BEGIN + "<think>\n", ["hm"], Answer(None, "hm")),
  "closed by the prompt": (BEGIN + "<think>\n\n</think>\n\n", ["4"], Answer("4", "")),
  "ended without a beginning": (BEGIN, ["hm</think>4"], Answer("4", "hm")),
  "marks that are only spelled out": (
    BEGIN,
    ["<think>", ["</think>5"], "</think>", ["<think>"], "4"],
    Answer("<think>4", "</think>5"),
  ),
  "thinks again": (BEGIN, ["<think>a</think>5<think>b</think>4"], Answer("4", "a\n5\nb")),
  "thinks again, not finished": (BEGIN, ["<think>a</think>5<think>b"], Answer(None, "a\n5\nb")),
}


@pytest.mark.parametrize("case", THINKING)
def test_what_follows_the_thoughts_is_the_answer(case, tmp_path):
  opening, parts, expected = THINKING[case]
  tokenizer = load("thinking", tmp_path)
  assert read(tokenizer, *parts, opening=opening) == expected


def test_marks_of_other_formats_are_text(tmp_path):
  text = "<think>a</think><|channel|>final<|message|>4\n"
  assert read(load("olmoe", tmp_path), text) == Answer(text, "")
  assert read(load("chatml", tmp_path), "\n" + text) == Answer("\n" + text, "")


def test_a_stop_token_is_no_part_of_the_answer(tmp_path):
  tokenizer = load("mixtral", tmp_path)
  assert read(tokenizer, "4x", reason="stop_token") == Answer("4", "")
  assert read(tokenizer, "4x", reason="length") == Answer("4x", "")
  harmony = load("harmony", tmp_path)
  assert read(harmony, START + ANALYSIS + "hm<|endoftext|>", reason="stop_token") == Answer(
    None, "hm"
  )


def test_an_answer_is_cut_before_a_stop_string(tmp_path):
  cut = dict(reason="stop_string", stop_strings=["Q:", "\n\n"])
  assert read(load("olmoe", tmp_path), " 4\n\nQ:", **cut) == Answer(" 4", "")
  thinking = load("thinking", tmp_path)
  assert read(thinking, "<think>a</think>4 Q:", **cut) == Answer("4 ", "a")
  assert read(thinking, "<think>a\n\nb</think>\n\n4\n\nQ", **cut) == Answer("4", "a\n\nb")
  # Special tokens are searched, but not shown.
  mark = dict(reason="stop_string", stop_strings=[".<|im_end|>", "im_end", "<|end|>"])
  assert read(thinking, "<think>a<|im_end|></think>4.<|im_end|>", **mark) == Answer("4", "a")
  harmony = load("harmony", tmp_path)
  assert read(harmony, ANALYSIS + "a<|end|>" + START + FINAL + "4<|end|>", **mark) == Answer(
    "4", "a"
  )


STOPPED = [  # format, what is generated, a stop string, what remains
  ("olmoe", "a\n\nb", "\n\n", "a"),
  ("olmoe", "a<|padding|>b", "<|padding|>", "a"),
  ("olmoe", "a<|padding|>b", "padd", "a"),
  ("olmoe", "é<|padding|>bé", "é<|pad", ""),
  ("chatml", "a.<|im_end|>\nb", ".<|im_end|>\n", "a"),
  ("thinking", "<think>x\n\ny</think>\n\na\n\nb", "\n\n", "<think>x\n\ny</think>\n\na"),
  ("thinking", "<think>x<|im_end|></think>a<|im_end|>b", "<|im_end|>", "<think>x</think>a"),
  ("harmony", ANALYSIS + "x.<|end|>" + START + FINAL + "a.b", ".", "analysisx.assistantfinala"),
  ("harmony", ANALYSIS + "x<|end|>" + START + FINAL + "a<|end|>b", "<|end|>", None),
  ("harmony", "a<|end|>b", "b", "a"),
]


@pytest.mark.parametrize("segment", [1, 3, 200])
@pytest.mark.parametrize("name, text, string, left", STOPPED)
def test_stop_strings_end_the_answer_and_see_special_tokens(
  name, text, string, left, segment, tmp_path
):
  """Where StopStringCriteria of transformers stops on the answer alone."""
  torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
  tokenizer = load(name, tmp_path)
  ids = tokens(tokenizer, text)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  criteria = transformers.generation.StopStringCriteria(theirs, [string])
  skipped = len(
    tokens(
      tokenizer,
      *[text[: text.rindex(m) + len(m)] for m in (FINAL, "</think>\n\n", "</think>") if m in text][
        :1
      ],
    )
  )
  expected = next(
    n for n in range(skipped + 1, len(ids) + 1) if criteria(torch.tensor([ids[skipped:n]]), None)
  )
  make = lambda index: answer_lib.reader(tokenizer, [], skip_special_tokens=False)
  for reader in (make, None)[: 1 + (name in ("olmoe", "chatml"))]:
    stops = stopping.Stops.create(tiny.config("olmoe"), (), [string], tokenizer.decode, reader)
    sequence = stopping.OpenSequence(0, 0, stops)
    array = np.array(ids)
    seen = [
      n
      for n in [*range(segment, len(ids), segment), len(ids)]
      if sequence.hits_stop_string(array, n)
    ]
    of_tokens = {"log_probs": array, "clean_tokens": array}
    found = sequence.completion(array, of_tokens, seen[0], True, 1000)
    assert (found.finish_reason, found.tokens) == ("stop_string", ids[:expected])
    if left is not None:
      assert found.text == left


def test_an_answer_comes_token_by_token(tmp_path):
  tokenizer = load("harmony", tmp_path)
  reader = answer_lib.reader(tokenizer, tokens(tokenizer, START))
  seen = []
  for token in tokens(tokenizer, ANALYSIS + "hm<|end|>" + START + FINAL + "ü4"):
    reader.push(token)
    if not seen or seen[-1] != reader.answer():
      seen.append(reader.answer())
  assert seen == [
    Answer(None, ""),
    Answer(None, "h"),
    Answer(None, "hm"),
    Answer("", "hm"),
    Answer("ü", "hm"),
    Answer("ü4", "hm"),
  ]


def test_half_a_character_at_the_end_is_read_as_it_is_decoded(any_tokenizer):
  ids = tokens(any_tokenizer, "aü")[:-1]
  final = "<|channel|>final<|message|>" if answer_lib.is_harmony(any_tokenizer) else ""
  reader = answer_lib.reader(any_tokenizer, tokens(any_tokenizer, final))
  for i in ids:
    reader.push(i)
  assert reader.answer().final == "a"
  reader.flush()
  assert reader.answer().final == any_tokenizer.decode(ids) == "a\N{REPLACEMENT CHARACTER}"
