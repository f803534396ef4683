import concurrent.futures
import fcntl
import itertools
import json

import pytest

from experiments.records import jsonl, store

REQUESTS = [{"id": i, "prompt": f"p{i}"} for i in range(3)]


@pytest.mark.parametrize(
  "lines, sentence",
  [
    (["{"], "line 1 is not valid JSON"),
    (["{}", "[]"], "line 2 must be a JSON object"),
    (["{}", "[" * 10**5], "line 2 is nested too deeply"),
    ([""], "the input is empty"),
    (['{"id": 1}', '{"max_tokens": 5}'], "line 2 has the unknown key 'max_tokens'"),
    (['{"id": "\\ud83d"}'], r"line 1 is not valid text.*surrogate \\ud83d"),
  ],
)
def test_bad_lines_are_refused(lines, sentence):
  with pytest.raises(ValueError, match=sentence):
    jsonl.parse(lines, ["id"])


def test_an_absent_file_is_refused():
  with pytest.raises(FileNotFoundError, match="does not exist"):
    jsonl.read("no_such_file.jsonl", ["id"])


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
    results.write(0, {"x": 0})
    results.write(1, {"x": 1})
  path.write_text(path.read_text() + '{"id": 2, "x"')
  with jsonl.Results(str(path), REQUESTS, {"n": 1}) as results:
    assert results.missing == [2]
    results.write(2, {"x": 2})
  records = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(r["index"], r["id"], r["x"], r["settings"]) for r in records] == [
    (i, i, i, {"n": 1}) for i in range(3)
  ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_finished_file_is_in_order_however_it_came_about(tmp_path, order):
  ordered, path = tmp_path / "ordered.jsonl", tmp_path / "results.jsonl"
  with jsonl.Results(str(ordered), REQUESTS, {"n": 1}) as results:
    for i in range(3):
      results.write(i, {"x": i})
  for i in order:  # one run for each result, each cut off within the next line
    with jsonl.Results(str(path), REQUESTS, {"n": 1}) as results:
      assert i in results.missing
      results.write(i, {"x": i})
      assert i not in results.missing
      # What a killed process has written is there already.
      assert json.loads(path.read_text().splitlines()[-1])["x"] == i
    if results.missing:
      path.write_text(path.read_text() + '{"index": ')
  assert path.read_bytes() == ordered.read_bytes()
  assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_was_complete_but_not_in_order_when_the_run_was_killed(tmp_path):
  path = tmp_path / "results.jsonl"
  with jsonl.Results(str(path), REQUESTS, {"n": 1}) as results:
    for i in range(3):
      results.write(i, {"x": i})
  whole = path.read_text()
  path.write_text("".join(reversed(whole.splitlines(keepends=True))))
  with jsonl.Results(str(path), REQUESTS, {"n": 1}) as results:
    assert results.missing == []
  assert path.read_text() == whole


def test_standard_output_is_in_order(capsys):
  def indices():
    return [json.loads(line)["index"] for line in capsys.readouterr().out.splitlines()]

  with jsonl.Results(None, REQUESTS, {}) as results:
    results.write(1, {})
    assert indices() == [] and results.missing == [0, 2]
    results.write(0, {})
    assert indices() == [0, 1]
    results.write(2, {})
    assert indices() == [2]
  # What is held back when the work is interrupted is printed at last.
  with pytest.raises(KeyboardInterrupt), jsonl.Results(None, REQUESTS, {}) as results:
    results.write(2, {})
    results.write(1, {})
    raise KeyboardInterrupt
  assert indices() == [1, 2]


def test_results_of_other_work_are_kept_and_refused(tmp_path):
  path = tmp_path / "results.jsonl"
  with jsonl.Results(str(path), REQUESTS, {"n": 1}) as results:
    results.write(0, {"x": 0})
  before = path.read_text()
  for requests, settings in ((REQUESTS, {"n": 2}), (REQUESTS[1:], {"n": 1}), ([], {"n": 1})):
    with pytest.raises(ValueError, match="other requests or settings"):
      jsonl.Results(str(path), requests, settings)
  record = json.loads(before)
  for bad in (
    [record, record],
    [record | {"index": 3}],
    [record | {"index": -1} | REQUESTS[-1]],
    [record | {"index": 1}],
    [record | {"index": None}],
    [{"settings": {"n": 1}}],
    [7],
  ):
    path.write_text("".join(json.dumps(r) + "\n" for r in bad))
    with pytest.raises(ValueError, match="other requests or settings"):
      jsonl.Results(str(path), REQUESTS, {"n": 1})
  path.write_text("a shopping list\n")
  with pytest.raises(ValueError, match="other requests or settings"):
    jsonl.Results(str(path), REQUESTS, {"n": 1})
  path.write_text(before)


def test_values_are_computed_once_for_each_name_and_settings(tmp_path):
  path, calls = tmp_path / "out" / "values.jsonl", []

  def compute():
    calls.append(1)
    return {"x": (1, 2.5)}

  for _ in range(2):  # the second time from the file, past a torn line
    kept = store.SavedValues(path, {"n": 1})
    assert kept.get("a", compute) == kept.get("a", compute) == {"x": [1, 2.5]}
    assert "a" in kept and "b" not in kept and len(calls) == 1
    with path.open("a") as file:
      file.write('{"name": "b", "val')
  other = store.SavedValues(path, {"n": 2})
  assert "a" not in other and other.get("a", lambda: 7) == 7
  assert store.SavedValues(path, {"n": 1}).get("a", compute) == {"x": [1, 2.5]} and len(calls) == 1
  assert len(path.read_text().splitlines()) == 2


def test_values_without_a_file_are_kept_for_the_run():
  kept = store.SavedValues(None, {})
  assert kept.get("a", lambda: 1) == kept.get("a", lambda: 2) == 1


@pytest.mark.parametrize("content", ["a shopping list\n", "[1]\n", '{"name": "a"}\n'])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
  path = tmp_path / "values.jsonl"
  path.write_text(content)
  with pytest.raises(ValueError, match="does not have values of earlier runs"):
    store.SavedValues(path, {})
  assert path.read_text() == content


def test_only_newlines_end_a_line_and_a_byte_order_mark_is_skipped(tmp_path):
  path, value = tmp_path / "in.jsonl", {"id": "a\u2028b\u2029c\x85d"}
  line = json.dumps(value, ensure_ascii=False)
  path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\n".encode())
  assert jsonl.read(str(path), ["id"]) == [value] * 2
  assert store.read_lines(path) == [value] * 2


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_refused_with_the_name_of_the_file(tmp_path, encoding):
  path = tmp_path / "in.jsonl"
  path.write_bytes('{"id": "é"}'.encode(encoding))
  with pytest.raises(ValueError, match=rf"{path} is not UTF-8 text .* convert it"):
    jsonl.read(str(path), ["id"])


def test_written_lines_are_valid_json_whatever_the_values(tmp_path):
  path = tmp_path / "out.jsonl"
  store.Store(path, None).add([{"x": [float("nan"), -float("inf"), 1.5]}])
  with jsonl.Results(str(tmp_path / "results.jsonl"), [{}], {}) as results:
    results.write(0, {"x": float("nan")})

  def refuse(constant):
    raise AssertionError(constant)

  for file, x in ((path, [None, None, 1.5]), (tmp_path / "results.jsonl", None)):
    assert json.loads(file.read_text(), parse_constant=refuse)["x"] == x


def test_programs_that_share_a_file_wait_for_each_other(tmp_path):
  path = tmp_path / "answers.jsonl"
  line = '{"key": "a", "answer": 1}\n'

  def opened():
    return store.Store(path, lambda r: r["key"], {"n": 1}, header=True)

  opened().add([{"key": "b", "answer": 2}])
  with path.open("ab", buffering=0) as other, concurrent.futures.ThreadPoolExecutor() as pool:
    fcntl.flock(other, fcntl.LOCK_EX)
    other.write(line[:9].encode())  # the other program is within a line
    reader = pool.submit(opened)
    with pytest.raises(concurrent.futures.TimeoutError):
      reader.result(timeout=0.05)
    other.write(line[9:].encode())
    fcntl.flock(other, fcntl.LOCK_UN)
    found = reader.result()
  assert list(found.records) == ["b", "a"]
  # Another program that is killed within a line leaves the lines after it whole.
  path.write_text(path.read_text() + line[:9])
  found.add([{"key": "a", "answer": 3}])
  lines = [json.loads(text) for text in path.read_text().splitlines()]
  assert lines[0] == {"settings": {"n": 1}} and [r["answer"] for r in lines[1:]] == [2, 1, 3]
  assert opened().records == {r["key"]: r for r in lines[1:]}
  with pytest.raises(ValueError, match="not written by this program: .* depend on other settings"):
    store.Store(path, None, {"n": 2}, header=True)
