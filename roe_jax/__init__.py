"""Roster of Experts (arXiv 2509.17238): one MoE model as an ensemble at inference.

params, config, tokenizer = roe_jax.open_model("path/or/hf:org/name")
roster = roe_jax.Roster.create(config, num_members=16, temperatures=0.3)
roe_jax.generate(params, config, prompts, roster=roster, max_new_tokens=64)
roe_jax.perplexity(params, config, tokens, roster=roster)
"""

import importlib.metadata

from roe_jax.aggregation import AGGREGATIONS, Aggregation
from roe_jax.cache_modes import CACHES, CacheMode
from roe_jax.checkpoint import save
from roe_jax.completion import Completion, Generation, Throughput
from roe_jax.config import ModelConfig
from roe_jax.decode import generate, stream
from roe_jax.diagnostics import member_logits, next_token_distributions, trace
from roe_jax.families import from_hugging_face, to_hugging_face
from roe_jax.model_formats import find_folder, load_config, load_params, open_model
from roe_jax.params import Params, initialize
from roe_jax.perturbations import FAMILIES as NOISES
from roe_jax.presets import PRESETS
from roe_jax.roster import Roster
from roe_jax.roster_caches import CleanCache, NoCache, StandardCache
from roe_jax.routing import GATE_WEIGHTS
from roe_jax.sampling import Sampler
from roe_jax.scoring import log_probs, perplexity, score, score_rosters
from roe_jax.text.answer import Answer
from roe_jax.text.chat import Chat
from roe_jax.text.tokenizer import StreamDecoder, Tokenizer
from roe_jax.transformer import forward

try:
  __version__ = importlib.metadata.version("roe_jax")
except importlib.metadata.PackageNotFoundError:  # a source tree that was not installed
  __version__ = "0+unknown"

__all__ = [
  "AGGREGATIONS",
  "CACHES",
  "GATE_WEIGHTS",
  "NOISES",
  "PRESETS",
  "Aggregation",
  "Answer",
  "CacheMode",
  "Chat",
  "CleanCache",
  "Completion",
  "Generation",
  "ModelConfig",
  "NoCache",
  "Params",
  "Roster",
  "Sampler",
  "StandardCache",
  "StreamDecoder",
  "Throughput",
  "Tokenizer",
  "__version__",
  "find_folder",
  "forward",
  "from_hugging_face",
  "generate",
  "initialize",
  "load_config",
  "load_params",
  "log_probs",
  "member_logits",
  "next_token_distributions",
  "open_model",
  "perplexity",
  "save",
  "score",
  "score_rosters",
  "stream",
  "to_hugging_face",
  "trace",
]
