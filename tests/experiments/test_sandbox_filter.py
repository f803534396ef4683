"""The filter of system calls, interpreted as the kernel would on either architecture."""

import os
import struct
import sys

import pytest

from experiments.sandbox import confinement

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the filter is for Linux")


def verdict(code, architecture, number, *arguments):
  """What the kernel's interpreter of a filter would return."""
  data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
  at = loaded = 0
  while True:
    operation, if_true, if_false, operand = code[at]
    at += 1
    if operation == 0x06:
      return {0x80000000: "kill", 0x00050001: "refuse", 0x7FFF0000: "allow"}[operand]
    if operation == 0x20:
      loaded = int.from_bytes(data[operand : operand + 4], "little")
    elif operation == 0x54:
      loaded &= operand
    else:
      assert operation == 0x15
      at += if_true if loaded == operand else if_false


# Numbers on the two architectures, from the kernel's tables; None where there is no such call.
REFUSED = {
  "clone": (56, 220),
  "clone3": (435, 435),
  "fork": (57, None),
  "vfork": (58, None),
  "execve": (59, 221),
  "execveat": (322, 281),
  "socket": (41, 198),
  "socketpair": (53, 199),
  "connect": (42, 203),
  "ptrace": (101, 117),
  "process_vm_readv": (310, 270),
  "tkill": (200, 130),
  "rt_sigqueueinfo": (129, 138),
  "pidfd_send_signal": (424, 424),
  "io_uring_setup": (425, 425),
  "setrlimit": (160, 164),
  "prctl": (157, 167),
  "seccomp": (317, 277),
  "mount": (165, 40),
  "unshare": (272, 97),
  "setns": (308, 268),
  "chmod": (90, None),
  "fchmodat": (268, 53),
  "truncate": (76, 45),
  "mkdir": (83, None),
  "mkdirat": (258, 34),
  "linkat": (265, 37),
  "symlinkat": (266, 36),
  "mknodat": (259, 33),
  "shmget": (29, 194),
  "memfd_create": (319, 279),
  "setuid": (105, 146),
  "bpf": (321, 280),
  "keyctl": (250, 219),
  "setsid": (112, 157),
  "setpriority": (141, 140),
  "openat2": (437, 437),
  "no such call": (9999, 9999),
  "read of the x32 interface": (0x40000000, None),
}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("files", [True, False])
def test_the_filter_refuses_and_allows_on_both_architectures(machine, files):
  architecture, column = confinement.ARCHITECTURES[machine]
  code = confinement.filter_code(machine, files, pid=77)
  assert len(code) < 4096  # the kernel's limit

  def of(numbers, *arguments):
    return verdict(code, architecture, numbers[column], *arguments)

  for name, numbers in REFUSED.items():
    if numbers[column] is not None:
      assert of(numbers) == "refuse", name
  for name in ("read", "write", "mmap", "futex", "exit_group", "clock_gettime"):
    assert of(confinement.ALLOWED[name]) == "allow", name
  assert [of(confinement.KILL, p, 9) for p in (77, 78, 0, 2**64 - 1)] == ["allow"] + ["refuse"] * 3
  assert (
    of(confinement.TGKILL, 77, 77, 6) == "allow" and of(confinement.TGKILL, 78, 78, 6) == "refuse"
  )
  assert of(confinement.FCNTL, 5, 3) == "allow"
  assert [of(confinement.FCNTL, 5, command) for command in (8, 10, 15)] == ["refuse"] * 3  # owners
  assert (
    of(confinement.IOCTL, 0, 0x5401) == "allow" and of(confinement.IOCTL, 0, 0x5412) == "refuse"
  )
  assert [of(confinement.PRLIMIT64, 0, 9, new) for new in (0, 1, 1 << 40)] == (
    ["allow", "refuse", "refuse"]
  )
  assert of(confinement.OPENAT, 0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == "allow"
  for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
    assert of(confinement.OPENAT, 0, 0, flags) == ("allow" if files else "refuse")
  for flags in (3, 3 | os.O_TRUNC, os.O_TMPFILE | os.O_RDWR):  # never: see `filter_code`
    assert of(confinement.OPENAT, 0, 0, flags) == "refuse"
  assert of(confinement.IN_OWN_FOLDER["unlinkat"]) == ("allow" if files else "refuse")
  other = confinement.ARCHITECTURES["aarch64" if machine == "x86_64" else "x86_64"][0]
  assert verdict(code, other, 0) == verdict(code, 0x40000003, 1) == "kill"  # 32-bit x86, too
