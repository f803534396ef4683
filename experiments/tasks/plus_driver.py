"""Runs a solution on a problem's inputs as evalplus does; a program for the sandbox.

It runs as source text, with only the standard library and NumPy. `__data__` is a pickled
dictionary with "entry_point" and "inputs" (a list of argument lists). With "solution" (source),
`__result__` gets the solution's pickled answers and times. With "reference", such a result, the
answers of the solution that `__peer__` serves are compared with it, on the inputs of "group" (a
slice) and with the tolerance "atol".
"""

import copy
import math
import pickle
import signal
import time

MIN_SECONDS, FACTOR = 4.0, 4.0  # time limit of an input: max(MIN_SECONDS, FACTOR x reference)


def is_floats(value):
  return isinstance(value, float) or (
    isinstance(value, (list, tuple)) and all(isinstance(v, float) for v in value)
  )


def polynomial(coefficients, x):
  return sum(c * math.pow(x, i) for i, c in enumerate(coefficients))


def agree(found, expected, atol):
  """Returns whether two values are equal, or close if they are floats."""
  if found == expected:
    return True
  if atol == 0 and is_floats(expected):
    atol = 1e-6
  if atol == 0 or type(found) is not type(expected):
    return False
  if isinstance(expected, (list, tuple)) and len(found) != len(expected):
    return False
  import numpy

  return bool(numpy.allclose(found, expected, rtol=1e-7, atol=atol))


def late(signum, frame):
  raise TimeoutError("the time limit of one input")


def main(job, peer):
  """Returns the pickled answers and times of a reference, or raises if an answer is wrong."""
  if "solution" in job:
    namespace = {}
    exec(compile(job["solution"], "solution.py", "exec"), namespace)
    function = namespace[job["entry_point"]]
    answers, times = [], []
    for arguments in job["inputs"]:
      arguments = copy.deepcopy(arguments)
      began = time.perf_counter()
      answers.append(function(*arguments))
      times.append(time.perf_counter() - began)
    return pickle.dumps((answers, times))
  signal.signal(signal.SIGALRM, late)
  group = slice(*job["group"])
  rows = zip(job["inputs"], *pickle.loads(job["reference"]))
  for arguments, expected, seconds in list(rows)[group]:
    signal.setitimer(signal.ITIMER_REAL, max(MIN_SECONDS, FACTOR * seconds))
    found = peer.call(*arguments)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if job["entry_point"] == "find_zero":  # any zero is right
      assert abs(polynomial(*arguments, x=found)) <= job["atol"], (arguments, found)
    else:
      assert agree(found, expected, job["atol"]), (arguments, found, expected)
  return b""


if "__data__" in globals():  # false when a test imports this module
  __result__ = main(pickle.loads(globals()["__data__"]), globals().get("__peer__"))
