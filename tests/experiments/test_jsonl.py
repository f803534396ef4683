import json

import pytest

from experiments import jsonl

REQUESTS = [{"id": i, "prompt": f"p{i}"} for i in range(3)]


@pytest.mark.parametrize("lines, sentence", [
    (["{"], "line 1 is not valid JSON"),
    (["{}", "[]"], "line 2 must be a JSON object"),
    ([""], "no line"),
])
def test_bad_lines_are_refused(lines, sentence):
  with pytest.raises(ValueError, match=sentence):
    jsonl.parse(lines)


def test_an_absent_file_is_refused():
  with pytest.raises(FileNotFoundError, match="does not exist"):
    jsonl.read("no_such_file.jsonl")


def test_tokens_are_taken_from_text_or_ids():
  encode = lambda text: [ord(c) for c in text]
  assert jsonl.tokens_of({"prompt": "ab"}, "prompt", encode, "request") == [97, 98]
  assert jsonl.tokens_of({"prompt_tokens": [5]}, "prompt", encode, "request") == [5]
  for bad in ({}, {"prompt": 3}, {"prompt_tokens": ["a"]}, {"prompt_tokens": [True]}):
    with pytest.raises(ValueError, match="request 7 must have"):
      jsonl.tokens_of(bad, "prompt", encode, "request 7")


def test_results_go_on_after_a_torn_line(tmp_path):
  path = tmp_path / "out" / "results.jsonl"
  with jsonl.Results(str(path), REQUESTS, {"n": 1}) as results:
    results.write([{"x": 0}, {"x": 1}])
  path.write_text(path.read_text() + '{"id": 2, "x"')
  with jsonl.Results(str(path), REQUESTS, {"n": 1}) as results:
    assert results.finished == 2
    results.write([{"x": 2}])
  records = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(r["id"], r["x"], r["settings"]) for r in records] == [
      (0, 0, {"n": 1}), (1, 1, {"n": 1}), (2, 2, {"n": 1})]


def test_results_of_other_work_are_kept_and_refused(tmp_path):
  path = tmp_path / "results.jsonl"
  with jsonl.Results(str(path), REQUESTS, {"n": 1}) as results:
    results.write([{"x": 0}])
  before = path.read_text()
  for requests, settings in ((REQUESTS, {"n": 2}), (REQUESTS[1:], {"n": 1}), ([], {"n": 1})):
    with pytest.raises(ValueError, match="other requests or settings"):
      jsonl.Results(str(path), requests, settings)
  path.write_text("a shopping list\n")
  with pytest.raises(ValueError, match="other requests or settings"):
    jsonl.Results(str(path), REQUESTS, {"n": 1})
  path.write_text(before)
