"""The page of all figures of a model."""

import json
import pathlib
import shutil

from experiments import app, figures
from experiments.figures.models import Model


def write(path: pathlib.Path, root: pathlib.Path, model: Model) -> str:
  """Writes the page, with the figures whose folders are complete.

  Args:
    path: of the page; its pictures go to docs/results beside it.
    root: the folder with the figures' folders.
    model: what they were made of.

  Returns:
    One line that sums it up.
  """
  pictures = path.parent / "docs" / "results"
  pictures.mkdir(parents=True, exist_ok=True)
  parts, found = [], []
  for group, names in (("The paper's figures and tables", figures.PAPER),
                       ("What its reviewers asked for", figures.REVIEWERS)):
    there = [name for name in names if (root / name / "about.json").is_file()]
    found += there
    if there:
      parts += [f"## {group}", *(_section(root / name, pictures, model) for name in there)]
  head = (f"# Results: {model.title}\n\nMade by `python -m experiments.reproduce`; every section "
          "names its command, date, seeds and machine. Intervals are 95 % bootstrap intervals over "
          "examples; what they leave open is not claimed.")
  app.write_atomically(path, "\n\n".join([head, *parts]) + "\n")
  return f"Saved {path} with {len(found)} of {len(figures.NAMES)} figures."


def _section(folder, pictures, model):
  module, about = figures.get(folder.name), json.loads((folder / "about.json").read_text())
  machine = about["machine"]
  parts = [f"### {folder.name}: {module.TITLE}", module.SAW, about["findings"],
           (folder / "table.md").read_text().strip()]
  if (folder / "figure.png").is_file():
    name = f"{model.name}-{folder.name}.png"
    shutil.copyfile(folder / "figure.png", pictures / name)
    parts.append(f"![{module.TITLE}](docs/results/{name})")
  parts.append(
      f"`{about['command']}`: {about['date']}, {about['seconds']:.0f} s, seeds "
      f"{', '.join(map(str, about['seeds']))}; {machine['cpu']}, {machine['cores']} cores, "
      f"{machine['device']}, jax {machine['jax']}.")
  return "\n\n".join(part for part in parts if part)
