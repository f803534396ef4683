import ast
import itertools

import pytest

from experiments.tasks.sanitizer import longest_program, sanitize


def longest_by_trying_all(text):
  lines, best, most = text.split("\n"), "", 0
  for i, j in itertools.combinations(range(len(lines) + 1), 2):
    count = sum(1 for line in lines[i:j] if line.strip())
    try:
      ast.parse("\n".join(lines[i:j]))
    except SyntaxError:
      continue
    if count > most:
      best, most = "\n".join(lines[i:j]), count
  return best


@pytest.mark.parametrize(
  "text",
  [
    "",
    "no program at all, is it?",
    "x = 1",
    "x = (\n1\n\ny = 2\nz = 3",
    "Here it is:\n```python\ndef f(x):\n  return x\n```\nHope that helps!",
    "def f(x):\n  '''Doc.\n\n  return x\n\ndef g(y):\n  return y",
    "a = 1\nb = 2\n)\nc = 3\nd = 4\ne = 5\n]\nf = 6",
    "import a\n  import b\nimport c\nimport d\ntry:\n  x = 1\n\ny = 2",
    "def f():\nreturn 1\ndef g():\n  return 2\n\n\n\nh = [1,\n  2\n  3]\n\nk = 1",
    "if x:\n  y\nelse\n  z\nfor i in j:\n  k\n",
  ],
)
def test_the_longest_program_is_the_one_that_trying_all_runs_of_lines_finds(text):
  found, expected = longest_program(text), longest_by_trying_all(text)
  assert [l for l in found.split("\n") if l.strip()] == [
    l for l in expected.split("\n") if l.strip()
  ]


def test_what_the_function_needs_is_kept_and_nothing_else():
  text = """Sure! Here is a solution:

```python
import math
from typing import List

LIMIT = 3
unused = 4

@staticmethod
def helper(x):
  return x + LIMIT

def other():
  return helper(2)

class Pair:
  pass

def solve(xs: List[int]) -> int:
  pair = Pair()
  return math.floor(sum(helper(x) for x in xs))

print(solve([1]))
assert solve([1]) == 4
if __name__ == "__main__":
  solve([2])
```
This runs in linear time."""
  assert (
    sanitize(text, "solve")
    == """import math
from typing import List
LIMIT = 3
@staticmethod
def helper(x):
  return x + LIMIT
class Pair:
  pass
def solve(xs: List[int]) -> int:
  pair = Pair()
  return math.floor(sum(helper(x) for x in xs))"""
  )


def test_the_first_definition_of_a_name_counts():
  assert sanitize("def f():\n  return 1\ndef f():\n  return 2", "f") == "def f():\n  return 1"


def test_a_torn_function_at_the_end_is_left_out():
  text = "def f(x):\n  return x\n\ndef g(y):\n  return [y,"
  assert sanitize(text, "f") == "def f(x):\n  return x"


def test_a_function_without_return_solves_nothing():
  assert sanitize("import os\ndef f(x):\n  pass", "f") == "import os"


def test_a_typed_constant_is_kept():
  assert sanitize("N: int = 2\ndef f():\n  return N", "f") == "N: int = 2\ndef f():\n  return N"


def test_texts_that_break_the_parser_are_no_programs():
  assert sanitize("\0", "f") == ""
  assert sanitize("(" * 5000, "f") == ""
  assert sanitize("def f():\n  return 1\n\0", "f") == "def f():\n  return 1"
