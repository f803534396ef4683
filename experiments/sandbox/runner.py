"""The process that runs one program: see `experiments.sandbox`.

    python runner.py FOLDER PARENT RESULTS < JOB

The job is a pickled dictionary, PARENT a process id, RESULTS an open descriptor. To
that it writes the job's "begun" when it is about to run the program, and its "token",
followed by what the program left as `__result__`, if the program ran to its end.
"""

import contextlib
import os
import pickle
import sys
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confinement  # found beside this file, as nothing else of the project is

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
  # No __name__, as in the authors' exec of HumanEval: what is under "if __name__ ==
  # '__main__'" does not run.
  namespace = {"__data__": job["data"]}
  sys.argv = ["program.py"]
  os.write(results, job["begun"])
  try:
    exec(compile(job["program"], "program.py", "exec"), namespace)
  except BaseException as error:  # SystemExit too: the program must run to its end
    traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
    sys.stderr.flush()
    os._exit(1)
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  answer = memoryview(job["token"] + namespace.get("__result__", b""))
  while answer:
    answer = answer[os.write(results, answer) :]
  os._exit(0)  # without what the program wants to do at exit


if __name__ == "__main__":
  main()
