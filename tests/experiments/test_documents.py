"""README.md and the guides: commands have flags that exist, and links lead somewhere."""

import pathlib
import re
import shlex

import command_lines
import jax
import numpy as np
import pytest
import scipy.special

from experiments.cli import app
import roe_jax

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# The harness's own program takes other flags, and is tested with it.
COMMAND = re.compile(
  r"python -m ((?:experiments\.(?!harness)\w+|checkpoints_convert)(?: +--?[^\n`|]*)?)"
)


def commands(text):
  """Commands of a page, in blocks and within lines."""
  text = text.replace("\\\n", " ")
  text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda span: span[0].replace("\n", " "), text)
  found = []
  for match in COMMAND.finditer(text):
    words = shlex.split(re.split(r" && | \d?> ", match[1])[0], comments=True)
    found.append(shlex.join([w for w in words if w != "..."]))
  return found


@pytest.mark.slow
def test_commands_have_flags_that_exist():
  lines = [line for page in PAGES for line in commands(page.read_text())]
  assert len(lines) > 60
  # A sentence may name a program, or a flag of it, without what it cannot do without.
  command_lines.check([line for line in lines if len(line.split()) > 2])


@pytest.mark.slow
def test_the_api_page_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for table, own in (
    (roe_jax.NOISES, "half_gumbel"),
    (roe_jax.AGGREGATIONS, "geometric"),
    (roe_jax.CACHES, "half"),
  ):
    monkeypatch.setitem(table, own, None)  # what the page adds is taken away after the test
  found: dict = {}
  with jax.numpy_rank_promotion("allow"):
    for block in re.findall(
      r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.M | re.S
    ):
      exec(block, found)
  np.testing.assert_allclose(
    found["after"],
    np.log(np.mean(scipy.special.softmax(found["logits"].astype(np.float64), -1), 0)),
    atol=1e-4,
  )
  assert found["losses"][-1] < found["losses"][0]
  app.load_tokenizer(str(tmp_path / "fine_tuned"))
  assert 0 < found["changed"] < 1


def anchors(text):
  """What headings are linked by."""
  return {
    re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    for title in re.findall(r"^#+ (.+)$", text, re.M)
  }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
  text = page.read_text()
  for link in re.findall(r"\]\(([^)]+)\)", text):
    if link.startswith(("http:", "https:")):
      continue
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target.read_text()), link
