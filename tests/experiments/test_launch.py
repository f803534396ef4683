"""The scripts of experiments/launch: they parse, and their commands have flags that exist."""

import os
import pathlib
import re
import shlex
import subprocess
import tarfile

import command_lines
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "launch"
SHELL = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
PROGRAM = r"(experiments\.\w+|checkpoints_convert)"


def shell_commands(path):
  """Every `python -m PROGRAM --flag ...` of a script, comments left out."""
  lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
  text = re.sub(r"\\\n\s*", "", "\n".join(lines))
  return [
    " ".join(match.groups())
    for match in re.finditer(
      rf"python3?\"? -m {PROGRAM}((?: +--\w+(?:=(?:\"[^\"]*\"|[^\s\"]*))?)+)", text
    )
  ]


def jobset():
  return yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())


def yaml_commands():
  """The pods' command, and with what the comments add on nodes with GPUs."""
  (job,) = jobset()["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  python, m, *command = container["command"]
  assert (python, m) == ("python", "-m")
  text = (FOLDER / "kubernetes.yaml").read_text()
  return [shlex.join(command), shlex.join([*command, *re.findall(r"^# +- (--\S+)$", text, re.M)])]


def run(script, *args, folder, **fakes):
  """Runs a script in `folder` with fake programs, which are given as shell lines.

  Returns:
    What it printed.
  """
  programs = folder / "bin"
  programs.mkdir()
  for name, line in fakes.items():
    (programs / name.replace("_", "-")).write_text(f"#!/bin/bash\n{line}\n")
    (programs / name.replace("_", "-")).chmod(0o755)
  env = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder)}
  env |= {"TPU": "slice", "ZONE": "zone"}
  return subprocess.run(
    ["bash", str(FOLDER / script), *args],
    cwd=folder,
    env=env,
    check=True,
    capture_output=True,
    text=True,
  ).stdout


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_scripts_are_valid_shell(path):
  subprocess.run(["bash", "-n", str(path)], check=True)
  assert shell_commands(path)


def test_pods_find_process_0():
  (job,) = jobset()["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  assert jobset()["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
  assert spec["completions"] == spec["parallelism"]
  # A JobSet names its pods JOBSET-JOB-REPLICA-INDEX, under a headless service of its own name.
  name = jobset()["metadata"]["name"]
  assert f"--coordinator_address={name}-{job['name']}-0-0.{name}:8476" in yaml_commands()[1]
  assert f"--num_processes={spec['parallelism']}" in yaml_commands()[1]


def test_a_slice_of_the_jobset_has_as_many_chips_as_its_pods_ask_for():
  (job,) = jobset()["spec"]["replicatedJobs"]
  pod = job["template"]["spec"]["template"]["spec"]
  rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  assert int(rows) * int(columns) == chips * job["template"]["spec"]["completions"]


def test_the_image_has_what_the_pods_need():
  lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
  steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
  copied = [word for step, rest in steps if step == "COPY" for word in rest.split()[:-1]]
  assert all((ROOT / name).exists() for name in copied) and "setup.cfg" in copied
  assert {"roe_jax", "checkpoints_convert", "experiments"} <= set(copied)
  (job,) = jobset()["spec"]["replicatedJobs"]
  group = job["template"]["spec"]["template"]["spec"]["securityContext"]["fsGroup"]
  assert ["USER", "roe"] in steps and any(f"--uid {group} roe" in rest for _, rest in steps)


def test_all_commands_have_flags_that_exist():
  commands = [c for path in SHELL for c in shell_commands(path)] + yaml_commands()
  assert sum("--distributed" in c for c in commands) == 4
  # What the shell or Kubernetes puts in may be a number.
  command_lines.check([re.sub(r"\$(\w+|\{[^}]*\}|\([^)]*\))", "1", c) for c in commands])


def test_a_slice_gets_the_tracked_files_and_python_3_12(tmp_path):
  for name in ("roe_jax/a b.py", ".venv/x.py", "results/big"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  git = ["git", "-C", str(tmp_path), "-c", "init.defaultBranch=main"]
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "add", "roe_jax"], check=True)
  out = run("tpu_pod.sh", "setup", folder=tmp_path, gcloud='echo "$@"')
  copy, install = out.split("compute tpus tpu-vm ")[1:]
  archive = re.match(r"scp (\S+) slice: --zone=zone --worker=all", copy)[1]
  assert tarfile.open(archive).getnames() == ["roe_jax/a b.py"]
  assert install.startswith("ssh slice --zone=zone --worker=all")
  assert re.search(r"uv venv .*--python 3\.12\b.*uv pip install .*'jax\[tpu\]'", install)


def test_a_slice_uses_a_port_that_its_firewall_opens(tmp_path):
  out = run("tpu_pod.sh", folder=tmp_path, gcloud='echo "$@"')
  assert re.search(r"JAX_COORDINATOR_PORT=8476 \.venv/bin/python -m .* --distributed", out)


def test_a_slice_is_requested_in_the_queue(tmp_path):
  first = run("tpu_pod.sh", "create", folder=tmp_path, gcloud='echo "$@"').splitlines()[0]
  assert first == (
    "compute tpus queued-resources create slice --node-id=slice --zone=zone "
    "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
  )


@pytest.mark.parametrize("driver,cuda", [("580.65.06", 13), ("575.51.03", 12), ("610.1", 13)])
def test_the_driver_chooses_cuda(driver, cuda, tmp_path):
  fakes = dict(nvidia_smi=f"echo {driver}", pip='echo pip "$@"')
  out = run("workstation.sh", "setup", folder=tmp_path, **fakes)
  assert out == f"pip install -e .[experiments] jax[cuda{cuda}]\n"
  (tmp_path / "cluster").mkdir()
  fakes["python3"] = f'mkdir -p "$3/bin" && cp {tmp_path}/bin/pip "$3/bin/pip"'
  out = run("slurm.sbatch", folder=tmp_path / "cluster", srun='echo srun "$@"', **fakes)
  assert out.splitlines()[0] == f"pip install -e .[experiments] jax[cuda{cuda}]"
  assert "-m experiments.generate --distributed" in out.splitlines()[1]
