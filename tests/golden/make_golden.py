"""Writes the logits of transformers for small models, as .npz files.

Run with torch and transformers installed, from the repository's root:

  PYTHONPATH=.:tests python tests/golden/make_golden.py

Weights are not stored: `hf.random_state` makes them from the stored config.
"""

import json
import pathlib

import hf
import numpy as np

CASES = {
  "olmoe": hf.config_json("olmoe"),
  "olmoe_normalized_clipped": hf.config_json("olmoe", norm_topk_prob=True, clip_qkv=0.8),
  "mixtral": hf.config_json("mixtral"),
  "mixtral_wide_heads": hf.config_json("mixtral", head_dim=12, rope_theta=1e6),
  "gpt_oss": hf.config_json("gpt_oss"),
  "qwen2_moe": hf.config_json("qwen2_moe"),
  "qwen2_moe_windows": hf.config_json("qwen2_moe", use_sliding_window=True),
  "qwen3_moe": hf.config_json("qwen3_moe"),
  "glm4_moe": hf.config_json("glm4_moe"),
  "deepseek_v3": hf.config_json("deepseek_v3"),
  "granitemoe": hf.config_json("granitemoe"),
  "granitemoeshared": hf.config_json("granitemoeshared"),
  "llama": hf.config_json("llama"),
  "mistral": hf.config_json("mistral"),
  "qwen2": hf.config_json("qwen2"),
  "qwen3": hf.config_json("qwen3"),
}


def main():
  folder = pathlib.Path(__file__).parent
  tokens = np.random.RandomState(1).randint(0, hf.SMALL["vocab_size"], (2, 16))
  for name, config in CASES.items():
    model = hf.to_model(config, hf.random_state(config))
    np.savez_compressed(
      folder / f"{name}.npz",
      config=json.dumps(config),
      tokens=tokens,
      logits=hf.logits(model, tokens),
    )


if __name__ == "__main__":
  main()
