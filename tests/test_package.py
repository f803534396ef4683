"""The package's metadata agree wherever they are written."""

import configparser
import pathlib

import yaml

import roe_jax

ROOT = pathlib.Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
METADATA = SETUP["metadata"]


def test_citation_and_changelog_have_the_version_and_license_of_the_package():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["version"] == METADATA["version"]
  assert citation["license"] == METADATA["license_expression"]
  assert citation["repository-code"] == citation["url"] == METADATA["url"]
  headings = [s for s in (ROOT / "CHANGELOG.md").read_text().splitlines() if s.startswith("## ")]
  assert headings[0] == "## Unreleased"
  assert headings[1] == f"## {METADATA['version']} - {citation['date-released']}"


def test_the_version_is_that_of_the_installed_package():
  assert roe_jax.__version__ in (METADATA["version"], "0+unknown")


def test_type_checkers_see_the_annotations():
  assert "py.typed" in SETUP["options.package_data"]["roe_jax"].split()
  assert (ROOT / "roe_jax/py.typed").is_file()


def test_ci_runs_one_script_on_the_oldest_and_the_newest_python():
  workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
  job = workflow["jobs"]["tests"]
  assert job["steps"][-1]["run"] == "bash .ci/run" and (ROOT / ".ci/run").is_file()
  pythons = [f"Programming Language :: Python :: {v}" for v in job["strategy"]["matrix"]["python"]]
  assert set(pythons) <= set(METADATA["classifiers"].split("\n"))
  assert METADATA.parser["options"]["python_requires"] == ">=3.11"


def test_hooks_are_tools_of_the_dev_extra():
  hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
  extra = SETUP["options.extras_require"]["dev"]
  assert all(hook["entry"].split()[0] in extra for hook in hooks)
