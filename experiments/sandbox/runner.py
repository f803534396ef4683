"""The process that runs one program; see `experiments.sandbox`.

    python runner.py FOLDER PARENT RESULTS < JOB

JOB is a pickled dictionary, PARENT a process id, RESULTS an open file descriptor. The process
writes the job's "begun" to it before it runs the program and, if the program ran to the end,
the job's "token" and the program's `__result__`. With "pipes", two more descriptors, the program
has a `peer.Peer` as `__peer__`.
"""

import contextlib
import os
import pickle
import sys
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confinement  # in this folder, the only one of the project on the path
import peer

del sys.path[0]


def main():
  folder, parent, results = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  job = pickle.load(sys.stdin.buffer)
  sys.path += [path for path in job["packages"] if path not in sys.path]
  try:
    confinement.confine(folder, job["packages"], job["limits"], parent, job["landlock"])
  except (confinement.Unconfinable, OSError) as error:
    os.write(results, str(error).encode())
    return
  null = os.open(os.devnull, os.O_RDONLY)
  os.dup2(null, 0)
  os.close(null)
  # No __name__, as in HumanEval's own exec: code under "if __name__ == '__main__'" does not run.
  namespace = {"__data__": job["data"]}
  if job["pipes"]:
    namespace["__peer__"] = peer.Peer(*job["pipes"])
  sys.argv = ["program.py"]
  os.write(results, job["begun"])
  try:
    exec(compile(job["program"], "program.py", "exec"), namespace)
  except BaseException as error:  # including SystemExit: the program must run to the end
    own = error.__traceback__  # of this file
    traceback.print_exception(error.with_traceback(own and own.tb_next))
    sys.stderr.flush()
    os._exit(1)
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  answer = memoryview(job["token"] + namespace.get("__result__", b""))
  while answer:
    answer = answer[os.write(results, answer) :]
  os._exit(0)  # without the program's exit handlers


if __name__ == "__main__":
  main()
