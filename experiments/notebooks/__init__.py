"""Notebooks that open in Colab, and what is asked of them.

A notebook calls the library: its cells hold no logic. The first cell has the "Open in Colab"
badge, the first code cell installs this package from `REF`, and outputs are stored of those
that need no accelerator. In the others the notebook's own process comes last: one process at a
time can have a TPU, and it keeps most of a GPU's memory, so that a program started after it fails.
`problems` tells what is wrong with one; `execute` runs it from a clean kernel:

    python -m experiments.notebooks --execute=quickstart,reproduce_figures
    python -m experiments.notebooks --rewrite     # links and install lines, after a change of REF
"""

import ast
from collections.abc import Iterator
import configparser
import importlib
import inspect
import os
import pathlib
import re
import shlex
import sys
from typing import Any

import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
_ROOT = FOLDER.parents[1]
_SETUP = configparser.ConfigParser()
_SETUP.read(_ROOT / "setup.cfg")
REPOSITORY = _SETUP["metadata"]["url"].removeprefix("https://github.com/")
REF = "main"  # the branch or tag that notebooks install and link to
NAMES = ("quickstart", "olmoe_colab", "reproduce_figures", "tpu")
# JAX 0.10.2 keeps Colab's numpy 2.1.3, so the runtime need not restart; 0.12 needs numpy 2.2.
JAX_RANGE = ">=0.10.2,<0.11"
JAX = {"olmoe_colab": "jax[cuda12]", "tpu": "jax[tpu]"}  # "jax", on CPUs, for the others
ON_CPU = ("quickstart", "reproduce_figures")
_LINK = re.compile(
  r"(?P<site>https://(?:colab\.research\.google\.com/github|github\.com))"
  r"/(?P<repository>[\w-]+/roe_jax)/(?P<kind>blob|tree)/(?P<version>[^/]+)"
  r"/(?P<path>[^)\s]+)"
)
_PACKAGES = ("roe_jax", "experiments", "checkpoints_convert")
_WITH_DEVICES = {"jax", "roe_jax", "checkpoints_convert"}  # what computes in the notebook's process
_LOGIC = (
  ast.FunctionDef,
  ast.AsyncFunctionDef,
  ast.ClassDef,
  ast.Lambda,
  ast.For,
  ast.AsyncFor,
  ast.While,
  ast.If,
  ast.IfExp,
  ast.Match,
  ast.BoolOp,
  ast.Try,
  ast.TryStar,
  ast.With,
  ast.AsyncWith,
  ast.ListComp,
  ast.SetComp,
  ast.DictComp,
  ast.GeneratorExp,
)
# Lines that are not Python's: programs, which `commands` finds, one expression, a variable.
_OTHER_LINES = ("!python -m ", "!python -c ", "%env ")
SECONDS = 300  # that a cell may take


def path(name: str) -> pathlib.Path:
  """The file of a notebook.

  Raises:
    ValueError: there is none of that name.
  """
  if name not in NAMES:
    raise ValueError(f"there is no notebook {name!r}; there are {', '.join(NAMES)}")
  return FOLDER / f"{name}.ipynb"


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(path(name), as_version=4)


def badge(name: str) -> str:
  """The Markdown of the "Open in Colab" badge."""
  return (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    f"(https://colab.research.google.com/github/{REPOSITORY}/blob/{REF}/"
    f"experiments/notebooks/{name}.ipynb)"
  )


def install_line(name: str) -> str:
  """The first code cell."""
  return (
    f'%pip install -q "roe_jax[experiments] @ git+https://github.com/{REPOSITORY}@{REF}" '
    f'"{JAX.get(name, "jax")}{JAX_RANGE}"'
  )


def links(notebook: nbformat.NotebookNode) -> list[tuple[str, str, str]]:
  """(repository, version, path) of links to files of this project, those of badges, too."""
  text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
  return [(m["repository"], m["version"], m["path"]) for m in _LINK.finditer(text)]


def rewrite(notebook: nbformat.NotebookNode, name: str) -> None:
  """Puts links and the install line as they should be."""
  for cell in notebook.cells:
    if cell.cell_type == "markdown":
      cell.source = _LINK.sub(
        lambda m: m["site"] + f"/{REPOSITORY}/{m['kind']}/{REF}/{m['path']}", cell.source
      )
  _code(notebook)[0].source = install_line(name)


def python(cell: nbformat.NotebookNode) -> str:
  """The Python of a cell, without lines that are none."""
  return "\n".join(line for line in _lines(cell) if line[:1] not in ("!", "%"))


def _code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _lines(cell):
  """Lines of a cell, those that are continued joined."""
  return cell.source.replace("\\\n", " ").splitlines()


def problems(name: str, notebook: nbformat.NotebookNode) -> Iterator[str]:
  """What is wrong with a notebook, without running it."""
  if notebook.cells[0].cell_type != "markdown" or badge(name) not in notebook.cells[0].source:
    yield "the first cell has not the badge " + badge(name)
  code = _code(notebook)
  if not code or code[0].source.strip() != install_line(name):
    yield "the first code cell is not " + install_line(name)
  for repository, version, where in links(notebook):
    if (repository, version) != (REPOSITORY, REF):
      yield f"a link leads to {repository} at {version}: {where}"
    elif not (_ROOT / where).exists():
      yield f"a link leads to a file that is not there: {where}"
  names: dict[str, Any] = {}
  is_taken = False
  for cell in code[1:]:
    lines = _lines(cell)
    for line in lines:
      if line[:1] in ("!", "%") and not line.startswith(_OTHER_LINES):
        yield f"a line is none of {', '.join(_OTHER_LINES)}: {line!r}"
      if is_taken and line.startswith("!"):
        yield f"the notebook's own process has the accelerator where a program starts: {line!r}"
    try:
      tree = ast.parse(python(cell))
    except SyntaxError as error:
      yield f"a cell does not compile: {error}"
      continue
    for node in ast.walk(tree):
      if isinstance(node, _LOGIC):
        yield f"a cell has logic ({type(node).__name__}) in {ast.unparse(node)[:60]!r}"
    yield from _missing(tree, names)
    is_taken |= name not in ON_CPU and bool(_WITH_DEVICES & set(_imported(tree)))
  if any(cell.get("outputs") for cell in code) != (name in ON_CPU):
    yield (
      "outputs are stored of notebooks that run without an accelerator, and of no others: "
      "--execute stores them"
    )


def _imported(tree):
  """Top-level packages that a cell imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module.partition(".")[0]


def _missing(tree, names):
  """What a cell imports or calls and is not there; `names` are those that cells before imported."""
  for node in ast.walk(tree):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      yield from _import(node, names)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      try:
        _resolve(node, names)
      except AttributeError:
        yield f"there is no {ast.unparse(node)}"
    if isinstance(node, ast.Call):
      yield from _call(node, names)


def _import(node, names):
  for alias in node.names:
    module = alias.name if isinstance(node, ast.Import) else node.module
    if module.partition(".")[0] not in _PACKAGES:
      continue
    try:
      found = importlib.import_module(module)
      if isinstance(node, ast.ImportFrom):
        found = getattr(found, alias.name, None) or importlib.import_module(
          f"{module}.{alias.name}"
        )
      elif not alias.asname:
        found = importlib.import_module(module.partition(".")[0])
    except ImportError as error:
      yield f"{ast.unparse(node)!r}: {error}"
      continue
    names[alias.asname or alias.name.partition(".")[0]] = found


def _resolve(node, names):
  """The object that a dotted name of the library is; None for what is not of it."""
  if isinstance(node, ast.Name):
    return names.get(node.id)
  if isinstance(node, ast.Attribute):
    owner = _resolve(node.value, names)
    if inspect.ismodule(owner) or inspect.isclass(owner):
      if inspect.isclass(owner) and node.attr in getattr(owner, "__annotations__", {}):
        return None
      return getattr(owner, node.attr)
  return None


def _call(node, names):
  try:
    function = _resolve(node.func, names)
    if function is None:
      return
    signature = inspect.signature(function)
  except (AttributeError, ValueError, TypeError):
    return
  if any(isinstance(a, ast.Starred) for a in node.args) or any(
    k.arg is None for k in node.keywords
  ):
    return
  try:
    signature.bind(*node.args, **{k.arg: k.value for k in node.keywords})
  except TypeError as error:
    yield f"{ast.unparse(node)[:80]!r}: {error}"


def commands(notebook: nbformat.NotebookNode) -> list[list[str]]:
  """The programs that cells start, [module, flag, ...], of lines `!python -m MODULE FLAG ...`."""
  lines = [line for cell in _code(notebook) for line in _lines(cell)]
  return [
    _without_redirection(shlex.split(line)[2:]) for line in lines if line.startswith("!python -m ")
  ]


def _without_redirection(words):
  return words[: next((i for i, w in enumerate(words) if re.fullmatch(r"[12]?>", w)), len(words))]


def execute(name: str, folder: pathlib.Path) -> nbformat.NotebookNode:
  """Runs a notebook from a clean kernel but for its install cell, in an empty folder.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell fails, or a program that it starts.
  """
  import nbclient

  # Programs that cells start are of this interpreter and of this package.
  environment = dict(os.environ)
  for variable, first in (("PATH", pathlib.Path(sys.executable).parent), ("PYTHONPATH", _ROOT)):
    environment[variable] = os.pathsep.join(filter(None, [str(first), os.environ.get(variable)]))
  notebook = read(name)
  install = _code(notebook)[0]
  kept, install.source = install.source, ""
  nbclient.NotebookClient(
    notebook,
    timeout=SECONDS,
    kernel_name="python3",
    extra_arguments=["--InteractiveShell.system_raise_on_error=True"],
    resources={"metadata": {"path": str(folder)}},
  ).execute(env=environment)
  install.source, install.outputs, install.execution_count = kept, [], None
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)  # when it was run
  for cell in _code(notebook):  # warnings of this machine
    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
  notebook.metadata.pop("language_info", None)
  return notebook
