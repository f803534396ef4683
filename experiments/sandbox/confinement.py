"""Confines the calling process permanently, with unprivileged features of the Linux kernel.

`runner` calls this before it runs an untrusted program. It needs the standard library only,
and the process cannot undo any of it:

* A seccomp filter allows only the system calls in `ALLOWED`, which computation needs. None of
  them creates a process, thread or socket, executes another program, signals or traces other
  processes, or changes limits.
* Landlock (Linux 5.13 or later) denies access to the file system, except to read Python and the
  system's libraries and, since Linux 6.2, to use regular files in one folder. This includes
  /proc, and so other processes' data. Without Landlock, root becomes the user `NOBODY`, who can
  read world-readable files.
* The filter denies opening files for writing where Landlock is missing or older than
  `TRUNCATE_VERSION`, because such a Landlock lets any file be truncated that the user may write.
* Capabilities are dropped and resources limited.

Sources: Linux man pages seccomp(2), landlock(7), capset(2), prctl(2), setrlimit(2); system call
numbers from the kernel's asm/unistd_64.h and asm-generic/unistd.h.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

NOBODY = 65534

# Architecture number of the audit subsystem, and column in the tables below.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# System call numbers on x86-64 and on AArch64, which lacks older ones.
ALLOWED = {
  "read": (0, 63),
  "write": (1, 64),
  "readv": (19, 65),
  "writev": (20, 66),
  "pread64": (17, 67),
  "pwrite64": (18, 68),
  "lseek": (8, 62),
  "close": (3, 57),
  "ftruncate": (77, 46),
  "getdents64": (217, 61),
  "pipe": (22, None),
  "pipe2": (293, 59),
  "dup": (32, 23),
  "dup2": (33, None),
  "dup3": (292, 24),
  "poll": (7, None),
  "ppoll": (271, 73),
  "select": (23, None),
  "pselect6": (270, 72),
  "stat": (4, None),
  "fstat": (5, 80),
  "lstat": (6, None),
  "newfstatat": (262, 79),
  "statx": (332, 291),
  "access": (21, None),
  "faccessat": (269, 48),
  "faccessat2": (439, 439),
  "readlink": (89, None),
  "readlinkat": (267, 78),
  "getcwd": (79, 17),
  "chdir": (80, 49),
  "umask": (95, 166),
  "mmap": (9, 222),
  "mprotect": (10, 226),
  "munmap": (11, 215),
  "brk": (12, 214),
  "mremap": (25, 216),
  "madvise": (28, 233),
  "rt_sigaction": (13, 134),
  "rt_sigprocmask": (14, 135),
  "rt_sigreturn": (15, 139),
  "sigaltstack": (131, 132),
  "alarm": (37, None),
  "getitimer": (36, 102),
  "setitimer": (38, 103),
  "nanosleep": (35, 101),
  "clock_nanosleep": (230, 115),
  "restart_syscall": (219, 128),
  "gettimeofday": (96, 169),
  "clock_gettime": (228, 113),
  "clock_getres": (229, 114),
  "times": (100, 153),
  "getpid": (39, 172),
  "getppid": (110, 173),
  "gettid": (186, 178),
  "getpgrp": (111, None),
  "getuid": (102, 174),
  "geteuid": (107, 175),
  "getgid": (104, 176),
  "getegid": (108, 177),
  "getgroups": (115, 158),
  "getrlimit": (97, 163),
  "getrusage": (98, 165),
  "uname": (63, 160),
  "sysinfo": (99, 179),
  "sched_yield": (24, 124),
  "sched_getaffinity": (204, 123),
  "getrandom": (318, 278),
  "futex": (202, 98),
  "set_tid_address": (218, 96),
  "set_robust_list": (273, 99),
  "rseq": (334, 293),
  "arch_prctl": (158, None),
  "exit": (60, 93),
  "exit_group": (231, 94),
}
OPEN, OPENAT = (2, None), (257, 56)
IN_OWN_FOLDER = {  # which Landlock confines to the folder
  "unlink": (87, None),
  "unlinkat": (263, 35),
  "rename": (82, None),
  "renameat": (264, 38),
  "renameat2": (316, 276),
}
KILL, TGKILL, FCNTL, IOCTL, PRLIMIT64 = (62, 129), (234, 131), (72, 25), (16, 29), (302, 261)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; not F_SETOWN, which signals others.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
IOCTL_COMMANDS = (0x5401, 0x5450, 0x5451)  # TCGETS (isatty), FIONCLEX, FIOCLEX
# Files without a name are in no folder, whose size is limited.
NAMELESS = getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY
WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | NAMELESS

# Landlock rights, and how many of them each early version has.
READ_FILE, READ_DIR, WRITE_FILE, REMOVE_FILE, MAKE_FILE, TRUNCATE = (
  1 << 2,
  1 << 3,
  1 << 1,
  1 << 5,
  1 << 8,
  1 << 14,
)
KNOWN_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
LATER_RIGHTS = 16
TRUNCATE_VERSION = 3  # the first with the right TRUNCATE (Linux 6.2)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on all architectures
_GET_VERSION, _PATH_BENEATH = 1, 1

_SET_PDEATHSIG, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_FILTER = 2
_RET_KILL, _RET_EPERM, _RET_ALLOW = 0x80000000, 0x00050001, 0x7FFF0000

_libc = ctypes.CDLL(None, use_errno=True)


class Unconfinable(Exception):
  """Raised where a process cannot be confined."""


def confine(
  folder: str, packages: list[str], limits: dict[str, int], parent: int, landlock: int | None = None
) -> None:
  """Confines this process to reading Python and using regular files in `folder`.

  Args:
    folder: becomes the working directory.
    packages: further folders of Python packages that it may read.
    limits: "cpu_seconds", "memory_bytes" (address space), "file_bytes" (of one file),
      "open_files".
    parent: process id of the parent; this process is killed when the parent dies.
    landlock: the newest version of Landlock to use, 0 for none; for tests.

  Raises:
    Unconfinable: the process cannot be confined.
  """
  machine = platform.machine()
  if sys.platform != "linux" or machine not in ARCHITECTURES:
    raise Unconfinable(
      f"the sandbox requires Linux on {' or '.join(ARCHITECTURES)}, got {platform.system()} on "
      f"{machine}"
    )
  os.chdir(folder)
  _prctl(_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(1)  # the parent died before the call above
  for kind, value in (
    (resource.RLIMIT_CPU, limits["cpu_seconds"]),
    (resource.RLIMIT_AS, limits["memory_bytes"]),
    (resource.RLIMIT_FSIZE, limits["file_bytes"]),
    (resource.RLIMIT_NOFILE, limits["open_files"]),
    (resource.RLIMIT_CORE, 0),
  ):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
  _prctl(_SET_NO_NEW_PRIVS, 1)
  version = _libc.syscall(_CREATE_RULESET, None, 0, _GET_VERSION)
  version = version if landlock is None else min(version, landlock)
  if version >= 1:
    _shut_file_system(folder, packages, version)
  else:
    _become_nobody()
  _drop_capabilities()
  _filter_system_calls(machine, files=version >= TRUNCATE_VERSION)


def _prctl(option, value, pointer=None):
  if _libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0):
    raise Unconfinable(f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}")


def _shut_file_system(folder, packages, version):
  """Allows reading Python, libraries and devices, and writing files in `folder`."""
  rights = (1 << KNOWN_RIGHTS.get(version, LATER_RIGHTS)) - 1
  attributes = struct.pack("=Q", rights)
  ruleset = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
  if ruleset < 0:
    raise Unconfinable(f"Landlock rejected a rule set: {os.strerror(ctypes.get_errno())}")
  read = READ_FILE | READ_DIR
  readable = {
    sys.prefix,
    sys.base_prefix,
    sys.exec_prefix,
    sys.base_exec_prefix,
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/dev/urandom",
    *packages,
  }
  rules = dict.fromkeys(readable, read) | {
    "/dev/null": read | WRITE_FILE,
    folder: read | WRITE_FILE | REMOVE_FILE | MAKE_FILE | TRUNCATE,
  }
  for path, allowed in rules.items():
    if not os.path.exists(path):
      continue
    if not os.path.isdir(path):
      allowed &= READ_FILE | WRITE_FILE
    file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", allowed & rights, file)
    if _libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0):
      raise Unconfinable(f"Landlock rejected a rule for {path}: {os.strerror(ctypes.get_errno())}")
    os.close(file)
  if _libc.syscall(_RESTRICT_SELF, ruleset, 0):
    raise Unconfinable(f"Landlock failed: {os.strerror(ctypes.get_errno())}")
  os.close(ruleset)


def _become_nobody():
  if os.geteuid() != 0:
    raise Unconfinable(
      'the kernel has no Landlock (Linux 5.13 or later with "landlock" among its security '
      "modules): run as root, or enable it"
    )
  os.setgroups([])
  os.setresgid(NOBODY, NOBODY, NOBODY)
  os.setresuid(NOBODY, NOBODY, NOBODY)
  for path in (os.__file__, sys.prefix):
    if not os.access(path, os.R_OK):
      raise Unconfinable(
        f"the kernel has no Landlock, so programs run as the user {NOBODY}, who cannot read "
        f"Python in {path}: use a world-readable Python"
      )


def _drop_capabilities():
  header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this thread
  if _libc.capset(header, bytes(24)):
    raise Unconfinable(f"capabilities cannot be dropped: {os.strerror(ctypes.get_errno())}")


def _filter_system_calls(machine, files):
  code = filter_code(machine, files, os.getpid())
  filters = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
  buffer = ctypes.create_string_buffer(filters, len(filters))
  program = struct.pack("@HP", len(code), ctypes.addressof(buffer))
  _prctl(_SET_SECCOMP, _SECCOMP_FILTER, program)


def filter_code(machine: str, files: bool, pid: int) -> list[tuple[int, int, int, int]]:
  """Returns the filter as classic BPF: (code, jump if true, jump if false, operand).

  Args:
    machine: one of `ARCHITECTURES`.
    files: whether files may be written; Landlock then restricts which.
    pid: the only process that may be signaled.
  """
  architecture, column = ARCHITECTURES[machine]
  code = [_load(_ARCHITECTURE), *_unless_equal(architecture, [_return(_RET_KILL)]), _load(_NUMBER)]
  for numbers in (ALLOWED | (IN_OWN_FOLDER if files else {})).values():
    code += _if_equal(numbers[column], [_return(_RET_ALLOW)])
  # (system call, index of an argument, values allowed for it)
  for numbers, argument, values in (
    (KILL, 0, [pid]),
    (TGKILL, 0, [pid]),
    (FCNTL, 1, FCNTL_COMMANDS),
    (IOCTL, 1, IOCTL_COMMANDS),
  ):
    tests = [_load(_argument(argument))]
    for value in values:
      tests += _if_equal(value, [_return(_RET_ALLOW)])
    code += _if_equal(numbers[column], [*tests, _return(_RET_EPERM)])
  # Limits may be read but not set: the pointer to new ones must be null.
  code += _if_equal(
    PRLIMIT64[column],
    [
      _load(_argument(2)),
      *_unless_equal(0, [_return(_RET_EPERM)]),
      _load(_argument(2) + 4),
      *_unless_equal(0, [_return(_RET_EPERM)]),
      _return(_RET_ALLOW),
    ],
  )
  for numbers, argument in ((OPEN, 1), (OPENAT, 2)):
    flags = _load(_argument(argument))
    # Access mode 3 opens any file and device without a right, and can truncate it.
    refused = [_and(os.O_ACCMODE), *_if_equal(os.O_ACCMODE, [_return(_RET_EPERM)])]
    tests = [flags, *refused] if files else []
    tests += [flags, _and(NAMELESS if files else WRITING)]
    tests += [*_if_equal(0, [_return(_RET_ALLOW)]), _return(_RET_EPERM)]
    code += _if_equal(numbers[column], tests)
  return [*code, _return(_RET_EPERM)]


# BPF instructions, and offsets in the struct seccomp_data.
_NUMBER, _ARCHITECTURE = 0, 4


def _argument(index):
  return 16 + 8 * index  # the low half, on these little-endian machines


def _load(offset):
  return (0x20, 0, 0, offset)


def _and(mask):
  return (0x54, 0, 0, mask)


def _return(action):
  return (0x06, 0, 0, action)


def _if_equal(value, instructions):
  """Runs the instructions if the loaded value is `value`; never for None."""
  return [] if value is None else [(0x15, 0, len(instructions), value), *instructions]


def _unless_equal(value, instructions):
  return [(0x15, len(instructions), 0, value), *instructions]
