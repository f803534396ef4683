"""The scripts of experiments/launch: they parse, and their commands have flags that exist."""

import pathlib
import re
import shlex
import subprocess

import command_lines
import pytest
import yaml

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "launch"
SHELL = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
PROGRAM = r"(experiments\.\w+|checkpoints_convert)"


def shell_commands(path):
  """Every `python -m PROGRAM --flag ...` of a script, comments left out."""
  lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
  text = "\n".join(lines).replace("\\\n", " ")
  return [
    " ".join(match.groups())
    for match in re.finditer(
      rf"python3? -m {PROGRAM}((?: +--\w+(?:=(?:\"[^\"]*\"|[^\s\"]*))?)+)", text
    )
  ]


def yaml_commands():
  """The pods' command, and with what the comments add on nodes with GPUs."""
  text = (FOLDER / "kubernetes.yaml").read_text()
  service, job = yaml.safe_load_all(text)
  python, m, *command = job["spec"]["template"]["spec"]["containers"][0]["command"]
  assert (python, m) == ("python", "-m")
  return [shlex.join(command), shlex.join([*command, *re.findall(r"^# +- (--\S+)$", text, re.M)])]


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_scripts_are_valid_shell(path):
  subprocess.run(["bash", "-n", str(path)], check=True)
  assert shell_commands(path)


def test_the_pods_find_their_service():
  service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
  pod = job["spec"]["template"]["spec"]
  assert service["spec"]["clusterIP"] == "None"
  assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
  assert pod["subdomain"] == service["metadata"]["name"]
  assert job["spec"]["completionMode"] == "Indexed"
  assert job["spec"]["completions"] == job["spec"]["parallelism"]
  address = f"{job['metadata']['name']}-0.{pod['subdomain']}:"
  assert all(f"--coordinator_address={address}" in c for c in yaml_commands()[1:])
  assert f"--num_processes={job['spec']['parallelism']}" in yaml_commands()[1]


def test_all_commands_have_flags_that_exist():
  commands = [c for path in SHELL for c in shell_commands(path)] + yaml_commands()
  assert sum("--distributed" in c for c in commands) == 4
  # What the shell or Kubernetes puts in may be a number.
  command_lines.check([re.sub(r"\$(\w+|\{[^}]*\}|\([^)]*\))", "1", c) for c in commands])
