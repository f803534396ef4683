"""Programs in processes of their own, forked from one that has imported them."""

import atexit
import multiprocessing
import os
import pathlib
import runpy
import socket
import sys

import jax

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
  [
    "checkpoints_convert.cli",
    "experiments.evaluate",
    "experiments.generate",
    "experiments.quantization_study",
    "experiments.quickstart",
    "experiments.score",
    "experiments.train",
  ]
)


class Run:
  """A program that runs: `python -m MODULE ARGUMENTS`.

  Attributes:
    process: a `multiprocessing.Process`.
  """

  def __init__(self, module, arguments, logs, *, devices=8, folder=".", environment=None):
    """Starts it.

    Args:
      module: its name.
      arguments: its flags.
      logs: a folder for what it prints.
      devices: that it sees.
      folder: where it runs.
      environment: variables to set.
    """
    logs.mkdir(parents=True, exist_ok=True)
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
  def output(self):
    return (self._logs / "output").read_text()

  @property
  def errors(self):
    return (self._logs / "errors").read_text()


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
  for name, descriptor in (("output", 1), ("errors", 2)):
    file = os.open(pathlib.Path(logs, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
  os.environ.update(environment)
  os.chdir(folder)
  sys.argv = [module, *arguments]
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  finally:
    sys.stdout.flush()
    atexit._run_exitfuncs()  # which multiprocessing leaves out
