"""Logits of transformers, written by `golden/make_golden.py`."""

import json
import pathlib

import hf
import numpy as np
import pytest

from roe_jax import families, transformer
from roe_jax import params as params_lib

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.npz"))


def test_every_family_has_a_file():
  assert set(hf.FAMILIES) <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_are_those_of_transformers(path):
  with np.load(path) as golden:
    hf_config, tokens, expected = (
      json.loads(str(golden["config"])),
      golden["tokens"],
      golden["logits"],
    )
  config = families.from_hugging_face(hf_config, dtype="float32")
  params = hf.to_params(hf_config, hf.random_state(hf_config))
  params_lib.validate(params, config)
  logits, _ = transformer.forward(params, config, tokens)
  assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
