import jax
import pytest

from experiments.tasks import wordmath_tokenizer
from roe_jax import checkpoint, params
from roe_jax.config import ModelConfig


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
  """A random one-layer model with the task's tokenizer, as a checkpoint folder."""
  folder = tmp_path_factory.mktemp("tiny")
  tokenizer = wordmath_tokenizer.build_tokenizer(num_problems=200)
  (folder / "files").mkdir()
  wordmath_tokenizer.save_tokenizer(tokenizer, folder / "files")
  config = ModelConfig(
    family="olmoe",
    vocab_size=tokenizer.get_vocab_size(),
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    experts_per_token=2,
    d_expert=8,
    context_length=128,
    normalize_gates=False,
    gates_in_model_dtype=True,
    qk_norm=True,
    initializer_range=0.3,
    eos_token_ids=(0,),
  )
  checkpoint.save(
    folder / "checkpoint",
    params.initialize(config, jax.random.key(0)),
    config,
    files=folder / "files",
  )
  return folder / "checkpoint"
