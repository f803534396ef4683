"""The embedded models: small MoEs trained by this project, as Hugging Face folders.

* `wordmath_control`: well trained; every problem of its training was new.
* `wordmath_overtrained`: the same architecture, trained on few problems again
  and again, so that it is too sure of what it says.
* `wordmath_d32`, `wordmath_d64`: `wordmath_control` in a quarter and half of its
  width (128), for a scaling law.
* `wordmath_KofE`: of width 64 and over-trained; each token goes through K of E
  experts.
* `wordmath_routing_HOW_SEED`: of width 32, trained plainly, with noise of this τ
  on the routers, with two experts per token, with a random number of them
  (Matryoshka), or as two members with half of the experts each (E3: see
  docs/training.md for how to run these), from three seeds.
* `text_routing_HOW_SEED`: as these, trained plainly or with noise, on source code
  and documentation of Python packages, with a BPE of 1,024 tokens.

All are OLMoE-like, speak the `wordmath` task of `experiments.tasks` only, or little
more than words of source code, and are made by `python -m experiments.train`;
`manifest.json` has the command and the scores.
"""

import pathlib

NAMES = (
  "wordmath_control",
  "wordmath_overtrained",
  "wordmath_d32",
  "wordmath_d64",
  "wordmath_1of16",
  "wordmath_2of16",
  "wordmath_4of16",
  "wordmath_8of16",
  "wordmath_4of8",
  "wordmath_4of32",
  *(
    f"wordmath_routing_{how}_{seed}"
    for how in ("plain", "noise_0.3", "noise_1", "two_experts", "matryoshka", "members")
    for seed in (1, 2, 3)
  ),
  *(
    f"text_routing_{how}_{seed}" for how in ("plain", "noise_0.3", "noise_1") for seed in (1, 2, 3)
  ),
)


def path(name: str) -> pathlib.Path:
  """Returns the folder of an embedded model.

  Raises:
    ValueError: there is no embedded model of that name.
  """
  if name not in NAMES:
    raise ValueError(f"unknown embedded model {name!r}; there are {', '.join(NAMES)}")
  return pathlib.Path(__file__).parent / name
