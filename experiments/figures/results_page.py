"""The page of all figures of a model, and what it was made of."""

import json
import pathlib
import shutil

from experiments import figures
from experiments.cli import app
from experiments.figures.figure_models import Model
from experiments.figures.work import ABOUT, PICTURE, RECORDS, read_records

PARTS = (
  ("The paper's figures and tables", figures.PAPER),
  ("What its reviewers asked for", figures.REVIEWERS),
)


def write(path: pathlib.Path, root: pathlib.Path, model: Model) -> str:
  """Writes the page, with the figures whose folders are complete.

  Records, pictures and what they were made with go to docs/results/MODEL beside it, from
  which the same page can be written again.

  Args:
    path: of the page.
    root: the folder with the figures' folders.
    model: what they were made of.

  Returns:
    One line that sums it up.
  """
  kept = path.parent / "docs" / "results" / model.name
  for name in figures.NAMES:
    if (root / name / ABOUT).is_file() and root.resolve() != kept.resolve():
      (kept / name).mkdir(parents=True, exist_ok=True)
      for file in (ABOUT, RECORDS, PICTURE):
        if (root / name / file).is_file():
          shutil.copyfile(root / name / file, kept / name / file)
  app.write_atomically(path, text(kept, model))
  found = [name for name in figures.NAMES if (kept / name / ABOUT).is_file()]
  return f"Saved {path} with {len(found)} of {len(figures.NAMES)} figures."


def text(kept: pathlib.Path, model: Model) -> str:
  """The page of what a folder docs/results/MODEL holds."""
  parts = [
    f"# Results: {model.title}\n\nMade by `python -m experiments.reproduce`; every section names its "
    "command, date, seeds and machine. Intervals are 95 % bootstrap intervals over examples. None of "
    "this says what large models do: the weights of the paper's models were not at hand, and the "
    "same commands with `--model=olmoe`, `mixtral` or `gpt_oss` are for where they are."
  ]
  for title, names in PARTS:
    there = [name for name in names if (kept / name / ABOUT).is_file()]
    if there:
      parts += [f"## {title}", *(_section(kept, name) for name in there)]
  return "\n\n".join(parts) + "\n"


def _section(kept, name):
  module, about = figures.get(name), json.loads((kept / name / ABOUT).read_text())
  records, machine = read_records(kept / name / RECORDS), about["machine"]
  parts = [
    f"### {name}: {module.TITLE}",
    module.SAW,
    f"**Here:** {module.findings(records)}",
    module.table(records),
  ]
  if (kept / name / PICTURE).is_file():
    parts.append(f"![{module.TITLE}](docs/results/{kept.name}/{name}/{PICTURE})")
  parts.append(
    f"`{about['command']}`\n\n{about['date']}; {about['seconds']:.0f} s, with the searches and comparisons "
    f"that it shares with others; noise seeds {', '.join(map(str, about['seeds']))}; {machine['cpu']}, "
    f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}, Python {machine['python']}, jax "
    f"{machine['jax']}."
  )
  return "\n\n".join(parts)
