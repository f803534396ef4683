"""The rooms of the project: one name for one thing, and imports that run downward."""

import ast
import collections
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("roe_jax", "checkpoints_convert", "experiments")
MODULES = {
  path.relative_to(ROOT): ast.parse(path.read_text("utf-8"))
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


@functools.cache
def imported_by(path):
  return tuple(imported(MODULES[path]))


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
  "path", [p for p in MODULES if "program" in {getattr(n, "name", "") for n in MODULES[p].body}]
)
def test_programs_report_errors_and_signals_in_the_one_place_that_does(path):
  (program,) = (n for n in MODULES[path].body if getattr(n, "name", "") == "program")
  called = {ast.unparse(node.func) for node in ast.walk(program) if isinstance(node, ast.Call)}
  assert called & {"app.run", "command_line.run", "command_line.reported"}


@pytest.mark.parametrize(
  "package, above", [("roe_jax", PACKAGES[1:]), ("checkpoints_convert", PACKAGES[2:])]
)
def test_imports_do_not_run_upward(package, above):
  for path in MODULES:
    if path.parts[0] == package:
      upward = [name for name in imported_by(path) if name.split(".")[0] in above]
      assert not upward, f"{path} imports {upward}"


def test_no_import_cycles():
  names = {dotted(path): path for path in MODULES}

  def uses(path):
    for name in imported_by(path):
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


def calls():
  for path, tree in MODULES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Call):
        yield path, node, getattr(node.func, "attr", getattr(node.func, "id", ""))


def test_text_files_are_utf8_whatever_the_locale():
  for path, call, name in calls():
    mode = {"open": "r", "read_text": "", "write_text": ""}.get(name)
    if mode is None or ast.unparse(call.func) == "os.open":
      continue
    given = [a.value for a in call.args if isinstance(a, ast.Constant)]
    binary = name == "open" and any(isinstance(a, str) and "b" in a for a in given)
    named = "utf-8" in given or "encoding" in {k.arg for k in call.keywords}
    assert binary or named, f"{path}:{call.lineno} reads or writes text in the locale's encoding"


def test_results_are_written_by_the_one_function_that_writes_valid_json():
  # Between processes any value may be sent.
  allowed = {"text_files.py", "distributed.py", "partners.py"}
  for path, call, _ in calls():
    if path.parts[0] == "experiments" and path.name not in allowed:
      checked = path.name == "jsonl.py" and "ensure_ascii" in {k.arg for k in call.keywords}
      written = ast.unparse(call.func) in ("json.dumps", "json.dump")
      assert checked or not written, f"{path}:{call.lineno}: use text_files.to_json"


@functools.cache
def imported_at_head(path):
  heads = [n for n in MODULES[path].body if isinstance(n, (ast.Import, ast.ImportFrom))]
  return tuple(imported(ast.Module([*heads], [])))


def reached(path, head_only):
  """Modules that a module imports, also through others: at their heads only, or anywhere."""
  names, found, left = {dotted(p): p for p in MODULES}, set(), [path]
  while left:
    module = left.pop()
    for name in imported_at_head(module) if head_only else imported_by(module):
      target = names.get(name) or names.get(name.rpartition(".")[0])
      if target and target not in found:
        found.add(target)
        left.append(target)
  return found | {path}


PROGRAMS = [p for p in NAMED if p.parent == pathlib.Path("experiments")]
EXTRAS = {"lm_eval", "matplotlib", "optuna", "skimage", "sklearn", "tabulate"}
SLOW = {"datasets", "orbax", "torch", "transformers"}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.stem)
def test_flags_are_checked_before_slow_or_optional_packages_are_imported(program):
  for path in reached(program, head_only=True):
    if path.name == "extras.py":
      continue
    packages = {name.split(".")[0] for name in imported_at_head(path)}
    assert not packages & (EXTRAS | SLOW), f"{program.stem} imports {path}"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.stem)
def test_programs_check_the_optional_packages_that_they_use(program):
  modules = reached(program, head_only=False)
  used = {
    name.split(".")[0] for path in modules if path.name != "extras.py" for name in imported_by(path)
  }
  for name in (name for path in modules for name in imported_by(path)):
    package, _, attribute = name.rpartition(".")
    if package == "experiments.cli.extras":
      used.add("matplotlib" if attribute == "plt" else attribute)
  stated = {
    element.value
    for node in ast.walk(MODULES[program])
    if isinstance(node, ast.keyword) and node.arg == "needs"
    for element in getattr(node.value, "elts", ())
  } | {
    element.value
    for node in ast.walk(MODULES[program])
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "extras.check"
    for element in getattr(node.args[0], "elts", ())
  }
  # A figure states its own, which `reproduce` checks before it measures.
  stated |= {
    element.value
    for path in modules
    for node in MODULES[path].body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NEEDS"
    for element in getattr(node.value, "elts", ())
  }
  assert used & EXTRAS <= stated
