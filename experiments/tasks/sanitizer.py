"""Extracts the program from generated text.

As in evalplus (commit 26d6d00), it is the longest run of lines that is valid Python, reduced
to the imports and what the entry point needs, without prose, Markdown fences, tests, prints
and an incomplete last function.
"""

import ast
import warnings


def sanitize(text: str, entry_point: str) -> str:
  """Returns the imports and the definitions that `entry_point` needs; "" if there are none.

  Definitions are classes, functions with a return, and assignments to a name; the first one of
  each name counts.
  """
  source = longest_program(text)
  lines = source.split("\n")
  imports, definitions = [], {}
  for node in _parse(source).body:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      imports.append(node)
    elif (name := _defined(node)) is not None:
      definitions.setdefault(name, node)
  needed, found = set(), [entry_point]
  while found:
    name = found.pop()
    if name in definitions and name not in needed:
      needed.add(name)
      found += [n.id for n in ast.walk(definitions[name]) if isinstance(n, ast.Name)]
  kept = imports + [node for name, node in definitions.items() if name in needed]
  return "\n".join(_lines_of(node, lines) for node in kept)


def longest_program(text: str) -> str:
  """Returns the run of lines that is valid Python and has the most non-blank lines."""
  lines = text.split("\n")
  best, most = "", 0
  for begin in range(len(lines)):
    if sum(map(bool, map(str.strip, lines[begin:]))) <= most:
      break
    end = _valid_end(lines, begin)
    count = sum(map(bool, map(str.strip, lines[begin:end])))
    if count > most:
      best, most = "\n".join(lines[begin:end]), count
  return best


def _valid_end(lines, begin):
  """Returns the largest `end` for which `lines[begin:end]` is valid."""
  end = len(lines)
  while end > begin:
    try:
      _parse("\n".join(lines[begin:end]))
      return end
    except SyntaxError as error:
      # No run from `begin` that includes the line of the error is valid.
      end = min(end - 1, begin + (error.lineno or end) - 1)
    except (ValueError, MemoryError, RecursionError):  # null bytes; nested too deeply
      end -= 1
  return begin


def _parse(source):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # invalid escapes
    return ast.parse(source)


def _defined(node):
  """Returns the name that a statement defines, or None."""
  if isinstance(node, ast.ClassDef):
    return node.name
  if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
    returns = any(isinstance(n, ast.Return) for n in ast.walk(node))
    return node.name if returns else None
  target = getattr(node, "target", None) or next(iter(getattr(node, "targets", ())), None)
  if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name):
    return target.id
  return None


def _lines_of(node, lines):
  first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
  return "\n".join(lines[first - 1 : node.end_lineno])
