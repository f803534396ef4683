"""Renders templates in a process of its own, so that their time and memory are limited.

Chat templates are downloaded code. The sandbox of jinja2 keeps them from everything but their
variables, but not from endless loops, or text that fills the memory.
"""

import atexit
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from typing import Any

# Limits of one request; a conversation of 100,000 characters takes milliseconds.
SECONDS = 10.0  # of CPU time
MEMORY_BYTES = 512 << 20  # of the process, which needs 30 MiB
CHARACTERS = 1 << 24
_HEADER = 8  # bytes that give the size of what follows them
_lock = threading.Lock()


class TemplateError(ValueError):
  """The template is invalid, refuses its variables, or exceeds a limit; the message says why."""


def variables(template: str) -> set[str]:
  """Returns the names that a template uses and does not define.

  Raises:
    TemplateError: the template is not valid.
  """
  return set(_ask(template, None))


def render(template: str, values: dict[str, Any], date: str) -> str:
  """Returns the text of a template.

  Args:
    template: a jinja template.
    values: its variables, of types that can be pickled.
    date: the day that `strftime_now` formats, YYYY-MM-DD.

  Raises:
    TemplateError: the template refuses the variables, or exceeds a limit.
  """
  return _ask(template, (values, date))


def end() -> int | None:
  """Ends the process, if there is one, and returns its exit code; the next request starts one."""
  if not (process := _running.pop(os.getpid(), None)):
    return None
  try:
    process.communicate(timeout=1)  # it ends with its standard input
  except (subprocess.TimeoutExpired, OSError):
    process.kill()
  return process.wait()


_running: dict[int, subprocess.Popen] = {}  # by the process that it renders for: not for its forks
atexit.register(end)


def _start() -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-P", __file__, str(SECONDS)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    process_group=0,  # Ctrl-C is for this process
  )


def _ask(*request: Any) -> Any:
  """Returns the answer of the process to a request."""
  data = pickle.dumps(request)
  with _lock:
    if os.getpid() not in _running:
      _running[os.getpid()] = _start()
    process = _running[os.getpid()]
    assert process.stdin and process.stdout
    try:
      process.stdin.write(len(data).to_bytes(_HEADER) + data)
      process.stdin.flush()
      size = int.from_bytes(process.stdout.read(_HEADER))
      answer = process.stdout.read(size)
    except BrokenPipeError:
      answer = b""
    except BaseException:  # such as Ctrl-C: the next answer would be the one to this request
      end()
      raise
    if not answer:
      code = end()
      raise TemplateError(
        f"it takes more than {SECONDS:g} seconds"
        if code == -signal.SIGPROF
        else f"the process that renders it ended with code {code}"
      )
  kind, value = json.loads(answer)
  if kind == "error":
    raise TemplateError(value)
  return value


def _environment():
  """Returns jinja2's environment, with what transformers adds to it."""
  import jinja2  # here, because only the other process needs it
  from jinja2 import ext, nodes, sandbox

  class GenerationBlocks(ext.Extension):
    """Renders the content of {% generation %} blocks, which mark training targets."""

    tags = {"generation"}  # noqa: RUF012 - as in the base class

    def parse(self, parser):
      line = next(parser.stream).lineno
      return nodes.Scope(
        parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
      )

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes for HTML.
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, ext.loopcontrols]
  )
  environment.globals["raise_exception"] = raise_exception
  environment.filters["tojson"] = to_json
  return environment


def _serve(seconds: float) -> None:
  """Answers requests from standard input until it is closed; each may take `seconds`."""
  import datetime

  import jinja2
  from jinja2 import meta

  try:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  except (ImportError, ValueError, OSError):
    pass  # where the system has no such limit
  environment = _environment()
  compiled = functools.lru_cache(8)(environment.from_string)

  def answer(template, values):
    if values is None:
      compiled(template)
      return sorted(meta.find_undeclared_variables(environment.parse(template)))
    named, date = values
    day = datetime.datetime.fromisoformat(date)
    text = compiled(template).render({"strftime_now": day.strftime} | named)
    if len(text) > CHARACTERS:
      raise ValueError(f"its text has more than {CHARACTERS:,} characters")
    return text

  while header := sys.stdin.buffer.read(_HEADER):
    request = pickle.loads(sys.stdin.buffer.read(int.from_bytes(header)))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, also in C code
    try:
      reply = json.dumps(["text", answer(*request)])
    except MemoryError:
      reply = json.dumps(["error", f"it needs more than {MEMORY_BYTES >> 20:,} MiB of memory"])
    except jinja2.TemplateSyntaxError as error:
      reply = json.dumps(["error", f"line {error.lineno}: {error.message}"[:500]])
    except Exception as error:  # template code may raise anything
      reply = json.dumps(["error", " ".join(str(error).split())[:500]])
    signal.setitimer(signal.ITIMER_PROF, 0)
    data = reply.encode()
    sys.stdout.buffer.write(len(data).to_bytes(_HEADER) + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  _serve(float(sys.argv[1]))
