"""Where results go: one program at a time writes an output, and streams are not files."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
import shlex
import socket
import stat
import sys

from roe_jax.checkpoint_folder import resolved

# What a program writes: into a folder; a file; a folder that it replaces as a whole; or something
# that several processes may write at once.
FOLDER, FILE, WHOLE_FOLDER, SHARED = "folder", "file", "whole folder", "shared"
LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # on some network file systems


def is_stream(path: pathlib.Path) -> bool:
  """Returns whether a path is a pipe, terminal or other device, which is only appended to."""
  try:
    mode = path.stat().st_mode
  except (FileNotFoundError, NotADirectoryError):
    return False
  return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def lock_file(file: int, wait: bool = True) -> bool:
  """Locks an open file until it is closed; returns False if another process has the lock.

  File systems without locks lock nothing.

  Args:
    file: its descriptor.
    wait: whether to wait for the lock.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
  return True


@contextlib.contextmanager
def held(output: str | None, kind: str = FOLDER) -> Iterator[None]:
  """Holds an output, so that no other program writes it.

  Args:
    output: a path, or None for standard output.
    kind: see above; nothing is held for `SHARED` and for files that are streams.

  Raises:
    ValueError: another program holds it, or the output is of the other kind.
  """
  path = pathlib.Path(output) if output else None
  if path is None or kind == SHARED or (kind == FILE and is_stream(path)):
    yield
    return
  if path.exists() and path.is_dir() == (kind == FILE):
    raise ValueError(f"{output} must be a {FILE if kind == FILE else FOLDER}, and is none")
  path = resolved(path)
  folder = path if kind == FOLDER else path.parent
  missing = [p for p in (folder, *folder.parents) if not p.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  lock = folder / (LOCK if kind == FOLDER else f".{path.name}{LOCK}")
  file = _acquire(lock, output)
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      lock.unlink()
    os.close(file)
    with contextlib.suppress(OSError):  # not empty
      for created in missing:
        created.rmdir()


def _acquire(lock, output):
  """Returns the locked file of a lock, whose text says who has it."""
  while True:
    file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if not lock_file(file, wait=False):
      who = os.read(file, 1000).decode(errors="replace").strip() or "another program"
      os.close(file)
      raise ValueError(f"{output} is being written by {who}: wait for it, or choose another output")
    # The former holder may have removed the file that was opened here.
    with contextlib.suppress(FileNotFoundError):
      if os.stat(lock).st_ino == os.fstat(file).st_ino:
        break
    os.close(file)
  command = shlex.join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]])
  os.truncate(file, 0)
  os.write(file, f"process {os.getpid()} on {socket.gethostname()} ({command})".encode()[:1000])
  return file
