"""Programs that mean harm, run by every kind of user that the sandbox knows.

Were it to fail, they would do little: what they start is bounded in number and time,
the signals they send are ones that processes ignore.
"""

import fcntl
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from experiments import sandbox
from experiments.sandbox import Program, confinement

SECRET = "a-secret-of-the-parent"
PACKAGE = pathlib.Path(sandbox.__file__).parent
HELPER = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
from experiments import sandbox
text, limits, options = pickle.load(sys.stdin.buffer)
outcome = sandbox.run_program(sandbox.Program(text, limits=sandbox.Limits(**limits)), **options)
pickle.dump(vars(outcome), sys.stdout.buffer)
"""

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by the Linux kernel"),
]


def public_python():
  """A Python of 3.11 or later that every user can read, or None.

  The tests' own is often in root's home.
  """
  for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
    try:
      found = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"],
        user=confinement.NOBODY,
        group=confinement.NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
      )
    except OSError:
      continue
    if found.stdout.strip() == "True":
      return python
  return None


@pytest.fixture(scope="module", params=["this user", "an ordinary user", "root without Landlock"])
def run(request):
  """`run(text, **limits)`: the outcome of a program, started by a process with a secret."""
  if request.param == "this user":
    python, options, identity = sys.executable, {}, {}
  else:
    if os.geteuid() != 0:
      pytest.skip('needs root; as "this user" an ordinary one has been tried')
    python = public_python()
    if python is None:
      pytest.skip("needs a Python of 3.11 or later that all users can read")
    options, identity = {"landlock": 0}, {}
    if request.param == "an ordinary user":
      options = {}
      identity = {"user": confinement.NOBODY, "group": confinement.NOBODY, "extra_groups": []}
  folder = pathlib.Path(tempfile.mkdtemp())
  folder.chmod(0o755)
  shutil.copytree(
    PACKAGE, folder / "experiments" / "sandbox", ignore=shutil.ignore_patterns("__pycache__")
  )

  def run(text, **limits):
    done = subprocess.run(
      [python, "-B", "-c", HELPER, str(folder)],
      capture_output=True,
      cwd="/",
      input=pickle.dumps((text, {"seconds": 5.0} | limits, options)),
      env={"SECRET": SECRET, "PATH": "/usr/bin:/bin"},
      **identity,
    )
    assert done.returncode == 0, done.stderr.decode()
    return sandbox.Outcome(**pickle.loads(done.stdout))

  run.user = identity.get("user", os.geteuid())
  run.writes_files = request.param != "root without Landlock"
  yield run
  shutil.rmtree(folder)


@pytest.fixture
def victim():
  """A file that everybody may write and remove, in a folder that everybody may."""
  folder = pathlib.Path(tempfile.mkdtemp())
  folder.chmod(0o777)
  file = folder / "precious"
  file.write_text("precious")
  file.chmod(0o666)
  yield file
  found = {p.name: (p.stat().st_mode & 0o777, p.read_text()) for p in folder.iterdir()}
  shutil.rmtree(folder)
  assert found == {"precious": (0o666, "precious")}


def not_refused(run, expressions, errors="PermissionError", **names):
  """Those of the expressions that a program can evaluate, or that fail otherwise."""
  outcome = run(f"""
import ctypes, fcntl, os, pathlib, resource, shutil, signal, socket, subprocess, sys, threading
globals().update({names!r})
done = []
for expression in {list(expressions)!r}:
  try:
    eval(expression)
    done.append(expression)
  except {errors}:
    pass
  except Exception as error:
    done.append(expression + ": " + repr(error))
__result__ = repr(done).encode()
""")
  assert outcome.passed, outcome
  return outcome.result.decode()


def test_a_program_that_runs_to_its_end_passes(run):
  outcome = run("print(sum(range(10)))\n__result__ = b'kept'")
  assert outcome.passed and outcome.reason == "passed"
  assert outcome.output == "45\n" and outcome.result == b"kept"


@pytest.mark.parametrize(
  "end",
  [
    "assert 1 == 2",
    "raise KeyboardInterrupt",
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import os; os.kill(os.getpid(), 40)",
    "def broken(:",
    "import sys; print('passed'); sys.stdout.flush(); raise SystemExit",
    "import os; os.closerange(0, 64); os._exit(0)",
    "import atexit, os; atexit.register(os._exit, 0); exit(0)",
    "import ctypes; ctypes.string_at(0)",
  ],
)
def test_a_program_that_ends_before_its_end_does_not_pass(run, end):
  outcome = run(end)
  assert not outcome.passed and outcome.reason != "passed"


def test_what_is_to_happen_at_exit_does_not_happen(run):
  outcome = run("import atexit; atexit.register(print, 'at exit')")
  assert outcome.passed and outcome.output == ""


def test_an_endless_loop_is_ended(run):
  began = time.monotonic()
  outcome = run("while True: pass", seconds=0.5)
  assert not outcome.passed and outcome.reason == "time limit"
  assert time.monotonic() - began < 20


def test_a_program_that_ignores_signals_and_sleeps_is_ended(run):
  outcome = run(
    """
import signal, time
for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
  signal.signal(s, signal.SIG_IGN)
while True:
  try:
    time.sleep(60)
  except BaseException:
    pass
""",
    seconds=0.5,
  )
  assert outcome.reason == "time limit"


def test_a_program_that_shuts_its_output_and_goes_on_is_ended(run):
  assert run("import os\nos.closerange(0, 64)\nwhile True: pass", seconds=0.5).reason == (
    "time limit"
  )


def test_no_process_and_no_thread_is_started(run):
  assert (
    not_refused(
      run,
      [
        "os.fork()",
        "os.forkpty()",
        "subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "threading.Thread(target=print).start()",
        "os.system('true') and 1 / 0",  # the shell does not start, which is told by a number
        "ctypes.CDLL(None).vfork() == -1 and 1 / 0",
      ],
      "(PermissionError, RuntimeError, ZeroDivisionError)",
    )
    == "[]"
  )


def test_a_fork_bomb_stays_one_process(run):
  outcome = run("""
import os, time
children = 0
for _ in range(100):
  try:
    if os.fork() == 0:
      time.sleep(2)
      os._exit(0)
    children += 1
  except OSError:
    pass
assert children == 0, children
""")
  assert outcome.passed, outcome


def test_no_daemon_outlives_its_program(run, victim):
  outcome = run(f"""
import os, time
try:
  if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
      time.sleep(1)
      open({str(victim)!r}, 'w').write('daemon')
    os._exit(0)
except OSError:
  pass
""")
  assert outcome.passed
  time.sleep(1.2)  # the victim's fixture looks whether it is unharmed


def test_a_memory_hog_gets_no_more_than_its_limit(run):
  outcome = run("x = bytearray(1 << 30)", memory_bytes=256 << 20)
  assert not outcome.passed and "MemoryError" in outcome.output
  hoard = "hoard = [bytes(1 << 20) for _ in range(3000)]"
  assert "MemoryError" in run(hoard, memory_bytes=256 << 20).output


def test_limits_cannot_be_changed(run):
  assert (
    not_refused(
      run,
      [
        "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)",
        "resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (10**6, 10**6))",
      ],
      "(ValueError, PermissionError)",
    )
    == "[]"
  )


def test_nothing_outside_of_its_folder_is_written_or_removed(run, victim):
  assert (
    not_refused(
      run,
      [
        "open(victim, 'w')",
        "open(victim, 'a')",
        "open(victim, 'r+')",
        "os.remove(victim)",
        "os.truncate(victim, 0)",
        "os.rename(victim, victim + '2')",
        "os.chmod(victim, 0)",
        "os.utime(victim)",
        "os.link(victim, victim + '2')",
        "os.symlink('/', victim + '2')",
        "os.mkdir(victim + '2')",
        "open(victim + '2', 'x')",
        "os.mkfifo(victim + '2')",
        "os.link(victim, 'here')",
        "os.rename(victim, 'here')",
        "os.setxattr(victim, 'user.a', b'b')",
        "os.open(os.path.dirname(victim), os.O_TMPFILE | os.O_WRONLY)",
        "os.mkdir('a-folder-in-its-own')",
        "os.symlink(victim, 'here')",
      ],
      victim=str(victim),
    )
    == "[]"
  )


def test_homes_and_the_project_are_not_written(run):
  files = [
    str(folder / "written-by-a-sandboxed-program")
    for folder in (pathlib.Path.home(), PACKAGE, pathlib.Path("/tmp"), pathlib.Path("/dev/shm"))
    if folder.is_dir()
  ]
  assert not_refused(run, [f"open({file!r}, 'w')" for file in files]) == "[]"
  assert not any(map(os.path.exists, files))


def test_a_secret_of_its_parents_user_is_not_read(run):
  folder = pathlib.Path(tempfile.mkdtemp())
  folder.chmod(0o755)
  secret = folder / "secret"
  secret.write_text(SECRET)
  secret.chmod(0o600)
  os.chown(secret, run.user, -1)
  try:
    assert (
      not_refused(run, ["open(secret)", "os.open(secret, os.O_RDONLY)"], secret=str(secret)) == "[]"
    )
  finally:
    shutil.rmtree(folder)


def test_its_folder_is_empty_and_its_own_and_removed(run):
  outcome = run("import os\nprint(os.getcwd(), os.listdir('.') if os.access('.', 4) else [])")
  folder, content = outcome.output.split(maxsplit=1)
  assert content.strip() == "[]" and not os.path.exists(folder)
  outcome = run(
    "open('a', 'w').write('b')\nassert open('a').read() == 'b'\n"
    "import os\nos.rename('a', 'c')\nos.remove('c')\nopen('left', 'w')"
  )
  assert outcome.passed == run.writes_files
  if not run.writes_files:
    assert "PermissionError" in outcome.output


@pytest.mark.parametrize(
  "text,reason",
  [
    ("open('big', 'wb').write(bytes(1 << 20))", "exception"),
    ("open('big', 'wb').truncate(1 << 20)", "exception"),
    ("for i in range(10**6): open(f'{i}', 'w').close()", "file limit"),
    ("while True:\n  for i in range(50): open(f'{i}', 'wb').write(bytes(90_000))", "file limit"),
  ],
)
def test_files_are_limited_in_size_and_number_and_together(run, text, reason):
  outcome = run(text, file_bytes=100_000, folder_bytes=1 << 20, files=80)
  assert not outcome.passed
  if run.writes_files:
    assert outcome.reason == reason


def test_a_hidden_hoard_of_removed_files_is_limited_by_descriptors(run):
  outcome = run(
    "import os\nhoard = []\nfor i in range(100):\n  hoard.append(open(f'{i}', 'wb'))\n"
    "  os.remove(f'{i}')"
  )
  assert not outcome.passed and "Error" in outcome.output


@pytest.mark.parametrize("hide", ["os.dup(f.fileno())", "m.append(mmap.mmap(f.fileno(), 4096))"])
def test_removed_files_count_as_long_as_they_are_open_or_mapped(run, hide):
  outcome = run(
    f"""
import mmap, os, time
m = []
for i in range(12):
  f = open('a', 'w+b')
  f.write(bytes(1 << 20))
  f.flush()
  {hide}
  os.remove('a')
  time.sleep(0.1)
""",
    file_bytes=1 << 20,
    folder_bytes=8 << 20,
  )
  assert not outcome.passed
  if run.writes_files:
    assert outcome.reason == "file limit"


@pytest.mark.parametrize("version", [1, 2])
def test_nothing_is_truncated_where_landlock_has_no_such_right(version, victim):
  text = f"""
import os
for flags in (3 | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY):
  try:
    os.open({str(victim)!r}, flags)
  except PermissionError:
    continue
  raise SystemExit(f"opened with {{flags}}")
"""
  outcome = sandbox.run_program(text, landlock=version)
  assert outcome.passed, outcome


def test_folders_of_killed_runs_are_removed_and_those_of_others_stay(monkeypatch, tmp_path):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  for name in ("sandbox-abandoned", "sandbox-young", "sandbox-locked"):
    (tmp_path / name).mkdir()
    if name != "sandbox-young":
      os.utime(tmp_path / name, (0, 0))
  lock = os.open(tmp_path / "sandbox-locked", os.O_RDONLY)
  fcntl.flock(lock, fcntl.LOCK_EX)
  assert sandbox.run_program("").passed
  os.close(lock)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["sandbox-locked", "sandbox-young"]


def test_no_connection_arrives(run):
  with socket.create_server(("127.0.0.1", 0)) as server:
    assert (
      not_refused(
        run,
        [
          "socket.create_connection(('127.0.0.1', port), 1)",
          "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
          "socket.socket(socket.AF_UNIX)",
          "socket.socketpair()",
        ],
        port=server.getsockname()[1],
      )
      == "[]"
    )
    server.settimeout(0.1)
    with pytest.raises(TimeoutError):
      server.accept()


def test_the_parents_environment_and_memory_cannot_be_read(run):
  outcome = run("""
import os
for name in ("environ", "mem", "cwd", "fd", "root"):
  path = f"/proc/{os.getppid()}/{name}"
  try:
    print(os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1000))
  except PermissionError:
    print("refused")
print(os.environ)
""")
  assert outcome.output.split()[:5] == ["refused"] * 5, outcome.output
  assert "SECRET" not in outcome.output and SECRET not in outcome.output


def test_only_itself_can_be_signalled(run):
  assert (
    not_refused(
      run,
      [
        *(
          f"os.kill({whom}, signal.SIGWINCH)"
          for whom in ("os.getppid()", "-1", "0", "-os.getpgrp()", "1")
        ),
        "os.killpg(0, signal.SIGWINCH)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGWINCH)",
        # What is ready to be read on a descriptor can be told to its owner, by any signal.
        "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
      ],
    )
    == "[]"
  )
  itself = run(
    "import os, signal\ngot = []\n"
    "signal.signal(signal.SIGUSR1, lambda *a: got.append(1))\n"
    "os.kill(os.getpid(), signal.SIGUSR1)\nassert got"
  )
  assert itself.passed


def test_nothing_else_of_the_system_is_within_reach(run):
  assert (
    not_refused(
      run,
      [
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.setuid(0)",
        "os.setresuid(0, 0, 0)",
        "os.nice(1)",
        "os.memfd_create('m')",
        "os.setsid()",
        "os.getxattr('/', 'a')",
        "os.chroot('/')",
        "os.chown('/dev/null', 0, 0)",
      ],
    )
    == "[]"
  )


def test_its_input_is_empty(run):
  outcome = run(
    "import sys, os\nassert sys.stdin.read() == '' and os.read(0, 10) == b''\n"
    "try:\n  input()\nexcept EOFError:\n  pass\nelse:\n  raise SystemExit"
  )
  assert outcome.passed, outcome


def test_huge_output_is_neither_kept_nor_waited_for(run):
  outcome = run("while True: print('x' * 10_000)", output_bytes=1 << 20)
  assert outcome.reason == "output limit" and len(outcome.output) <= 4096
  long = run("print('x' * 100_000 + 'end')")
  assert long.passed and len(long.output) == 4096 and long.output.endswith("end\n")


def test_a_huge_result_is_refused(run):
  assert run("__result__ = bytes(1 << 21)", result_bytes=1 << 20).reason == "result limit"


def test_what_is_written_where_results_are_read_is_no_success(run):
  outcome = run(
    "import os\nfor i in range(3, 32):\n  try:\n"
    "    os.write(i, b'confined\\n' + bytes(16))\n"
    "  except OSError:\n    pass\nos._exit(0)"
  )
  assert not outcome.passed


def test_a_program_may_be_longer_than_an_argument(run):
  outcome = run("x = [" + "1000," * 200_000 + "]\nassert len(x) == 200_000")
  assert outcome.passed


def test_results_do_not_depend_on_random_hashes(run):
  text = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
  assert run(text).output == run(text).output


def test_its_process_dies_with_its_parent(tmp_path):
  parent = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "from experiments import sandbox\n"
      'sandbox.run_program(sandbox.Program(\'import os\\nopen("started", "w")\\n'
      "while True: pass', limits=sandbox.Limits(seconds=20)))",
    ],
    cwd=PACKAGE.parent.parent,
    env=os.environ | {"TMPDIR": str(tmp_path)},
  )
  try:
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("*/started")):
      assert time.monotonic() < deadline and parent.poll() is None
      time.sleep(0.05)
    (child,) = _children(parent.pid)
  finally:
    parent.kill()
    parent.wait()
  deadline = time.monotonic() + 10
  while os.path.exists(f"/proc/{child}") and _state(child) != "Z":
    assert time.monotonic() < deadline, "it outlived its parent"
    time.sleep(0.05)


def _children(pid):
  return [
    int(c)
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir()
    for c in (task / "children").read_text().split()
  ]


def _state(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
  except FileNotFoundError:
    return "Z"


def test_several_run_at_once_and_keep_their_order():
  barrier = "import time\ntime.sleep(1.0)\n__result__ = b'%d'"
  ended, here = {}, threading.get_ident()
  began = time.monotonic()
  outcomes = sandbox.run_programs(
    [Program(barrier % i) for i in range(6)],
    workers=6,
    on_done=lambda i: ended.update({i: threading.get_ident()}),
  )
  assert time.monotonic() - began < 5.0
  assert [o.result for o in outcomes] == [b"%d" % i for i in range(6)]
  assert ended == dict.fromkeys(range(6), here)


def test_data_reach_the_program():
  outcome = sandbox.run_program(Program("__result__ = __data__[::-1]", b"abc"))
  assert outcome.result == b"cba"


def test_packages_of_this_python_are_there():
  import numpy

  outcome = sandbox.run_program("import numpy\n__result__ = numpy.__version__.encode()")
  assert outcome.result.decode() == numpy.__version__, outcome
  sandbox.check_support()


def test_a_machine_that_cannot_confine_is_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(confinement, "ARCHITECTURES", {})
  with pytest.raises(confinement.Unconfinable, match="the sandbox requires Linux on"):
    confinement.confine(str(tmp_path), [], {}, os.getppid())


def test_a_process_that_cannot_confine_itself_runs_nothing(monkeypatch, tmp_path):
  folder = tmp_path / "sandbox"
  shutil.copytree(PACKAGE, folder)
  source = (folder / "confinement.py").read_text()
  (folder / "confinement.py").write_text(
    source.replace('"x86_64":', '"z80":').replace('"aarch64":', '"6502":')
  )
  monkeypatch.setattr(sandbox, "_RUNNER", folder / "runner.py")
  with pytest.raises(ValueError, match="cannot be confined on this machine: the sandbox requires"):
    sandbox.run_program(f"open({str(tmp_path / 'ran')!r}, 'w')")
  assert not (tmp_path / "ran").exists()
