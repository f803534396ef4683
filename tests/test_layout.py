"""The rooms of the project: one name for one thing, and imports that run downward."""

import ast
import collections
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("roe_jax", "checkpoints_convert", "experiments")
MODULES = {
  path.relative_to(ROOT): ast.parse(path.read_text())
  for package in PACKAGES
  for path in sorted((ROOT / package).rglob("*.py"))
}
NAMED = [path for path in MODULES if not path.stem.startswith("__")]


def imported(tree):
  """Dotted names of all that a module imports, at its head or within functions."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(path):
  parts = path.with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_two_modules_share_a_basename():
  places = collections.defaultdict(list)
  for path in NAMED:
    places[path.stem].append(str(path))
  assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_module_has_the_name_of_a_public_function():
  """Within a library anywhere; of programs and what supports them within one folder."""
  room = lambda path: path.parent if path.parts[0] == "experiments" else path.parts[0]
  functions = {
    (room(path), node.name)
    for path, tree in MODULES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef)
  }
  assert [str(path) for path in NAMED if (room(path), path.stem) in functions] == []


def test_the_files_of_experiments_are_its_programs():
  for path in NAMED:
    if path.parent == pathlib.Path("experiments"):
      names = {node.name for node in MODULES[path].body if isinstance(node, ast.FunctionDef)}
      assert "program" in names, f"{path} is not a program"


@pytest.mark.parametrize(
  "package, above", [("roe_jax", PACKAGES[1:]), ("checkpoints_convert", PACKAGES[2:])]
)
def test_imports_do_not_run_upward(package, above):
  for path, tree in MODULES.items():
    if path.parts[0] == package:
      upward = [name for name in imported(tree) if name.split(".")[0] in above]
      assert not upward, f"{path} imports {upward}"


def test_no_import_cycles():
  names = {dotted(path): path for path in MODULES}

  def uses(path):
    for name in imported(MODULES[path]):
      target = names.get(name) or names.get(name.rpartition(".")[0])
      # A package's own __init__ gathers what is in its modules.
      if (
        target
        and target != path
        and not (target.name == "__init__.py" and target.parent in path.parents)
      ):
        yield target

  graph = {path: set(uses(path)) for path in MODULES}
  while free := [path for path, needed in graph.items() if not needed]:
    for path in free:
      del graph[path]
    for needed in graph.values():
      needed.difference_update(free)
  assert not graph, f"import cycles among {sorted(map(str, graph))}"
