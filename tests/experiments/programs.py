"""Programs in processes of their own, forked from one that has imported them."""

import atexit
import ctypes
import gc
import importlib
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import sys
import tempfile

import jax

_SET_PDEATHSIG = 1
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
  [
    "checkpoints_convert.cli",
    "experiments.accelerator",
    "experiments.benchmark",
    "experiments.evaluate",
    "experiments.generate",
    "experiments.meshes",
    "experiments.quantization_study",
    "experiments.quickstart",
    "experiments.report",
    "experiments.reproduce",
    "experiments.score",
    "experiments.train",
    "experiments.tune",
    # What programs import at first use.
    "experiments.evaluation.lm_eval_model",
    "experiments.evaluation.lm_eval_tasks",
    "matplotlib.pyplot",
    "optuna",
    "orbax.checkpoint.v1",
    "scipy.optimize",
    "scipy.stats",
    "tabulate",
  ]
)


class Run:
  """A running program: `python -m MODULE ARGUMENTS`, the leader of its process group.

  Attributes:
    process: a `multiprocessing.Process`.
  """

  def __init__(
    self, module, arguments, logs=None, *, devices=8, folder=".", environment=None, stdin=""
  ):
    """Starts it.

    Args:
      module: its name, or Python code of several lines.
      arguments: its flags.
      logs: a folder for what it prints; a new one by default.
      devices: number of devices it sees.
      folder: where it runs.
      environment: variables to set.
      stdin: text of its standard input.
    """
    logs = pathlib.Path(tempfile.mkdtemp()) if logs is None else logs
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "input").write_text(stdin)
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    settings = {"XLA_FLAGS": " ".join(flags), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if jax.config.jax_compilation_cache_dir:  # what one process compiles serves the others
      settings["ROE_JAX_CACHE"] = jax.config.jax_compilation_cache_dir
    self._logs = logs
    self.process = context.Process(
      target=_main,
      args=(module, list(arguments), str(logs), str(folder), settings | (environment or {})),
    )
    self.process.start()

  def exit_code(self, seconds=240):
    """Waits for the end."""
    self.process.join(seconds)
    if self.process.is_alive():
      self.process.kill()
      raise TimeoutError(f"still running after {seconds} s: {self.errors}")
    return self.process.exitcode

  @property
  def returncode(self):
    return self.exit_code()

  @property
  def output(self):
    return (self._logs / "output").read_text()

  @property
  def errors(self):
    return (self._logs / "errors").read_text()


def call(module, *arguments, **settings):
  """Runs a program to its end, whatever it is; see `Run`."""
  done = Run(module, arguments, **settings)
  done.exit_code()
  return done


def run(*arguments, **settings):
  """Runs a program to its end, which must be a good one; see `Run`."""
  done = Run(*arguments, **settings)
  assert done.exit_code() == 0, done.errors


def two(module, arguments, logs, *, folders=(".", "."), own=((), ()), environments=None):
  """Starts a program as two processes with four devices each."""
  if environments is None:
    arguments = [*arguments, f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    own = [[f"--process_id={i}", *more] for i, more in enumerate(own)]
  return [
    Run(
      module,
      [*arguments, "--distributed", *own[i]],
      logs / str(i),
      devices=4,
      folder=folders[i],
      environment=environments and environments[i],
    )
    for i in range(2)
  ]


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def _main(module, arguments, logs, folder, environment):
  gc.freeze()  # what was imported before is never garbage, and its pages stay shared
  os.setsid()
  if sys.platform == "linux":  # the fork server ends with the tests, however these end
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
  for name, descriptor, flags in (
    ("input", 0, os.O_RDONLY),
    ("output", 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ("errors", 2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
  ):
    os.dup2(os.open(pathlib.Path(logs, name), flags), descriptor)
  sys.stdin = open(0, closefd=False)
  os.environ.update(environment)
  if "lm_eval" in sys.modules:
    importlib.import_module("harness_index")
  os.chdir(folder)
  sys.argv = ["-c" if "\n" in module else module, *arguments]
  try:
    if "\n" in module:
      exec(compile(module, "script", "exec"), {"__name__": "__main__"})
    else:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
  finally:
    sys.stdout.flush()
    atexit._run_exitfuncs()  # which multiprocessing leaves out
