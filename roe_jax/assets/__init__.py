"""The embedded models: small MoEs of this project's own, as checkpoint folders.

* `wordmath_control`: well trained; every problem of its training was new.
* `wordmath_overtrained`: the same architecture, trained on few problems again
  and again, so that it is too sure of what it says.

Both are OLMoE-like, speak the `wordmath` task of `experiments.tasks` only, and
are made by `python -m experiments.train`; `checkpoint.load_provenance` tells
how, and their scores.
"""

import pathlib

NAMES = ("wordmath_control", "wordmath_overtrained")


def path(name: str) -> pathlib.Path:
  """The checkpoint folder of an embedded model, for `checkpoint.load`.

  Raises:
    ValueError: there is no embedded model of that name.
  """
  if name not in NAMES:
    raise ValueError(f"unknown embedded model {name!r}; there are {', '.join(NAMES)}")
  return pathlib.Path(__file__).parent / name
