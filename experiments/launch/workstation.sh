#!/usr/bin/env bash
# One machine with several GPUs: one process, which drives all of them.
#
#   bash experiments/launch/workstation.sh prompts.jsonl results.jsonl
#
# Needs: pip install -e . "jax[cuda13]"; nvidia-smi shows the GPUs.
set -euo pipefail
INPUT=$1 OUTPUT=$2

# Once: Qwen3-30B-A3B with its experts in 8 bits, 32.5 GB instead of 61.1, in the memory of a layer.
[ -d qwen3-int8 ] || python -m checkpoints_convert --source=Qwen/Qwen3-30B-A3B-Instruct-2507 \
  --target=qwen3-int8 --quantize_experts=int8

# Does it fit, and how fast could it be?
python -m experiments.generate --checkpoint=qwen3-int8 --mesh=auto --num_members=16 \
  --temperature_profile=0.2 --max_new_tokens=512 --dry_run

# --mesh=auto spreads the experts over all GPUs. Killed and started again, it goes on.
python -m experiments.generate --checkpoint=qwen3-int8 --mesh=auto --num_members=16 \
  --temperature_profile=0.2 --max_new_tokens=512 --chat --input="$INPUT" --output="$OUTPUT"

# What the last command prints (here of the embedded model on eight devices of a CPU):
#   [mesh data:1,expert:8,tensor:1]
#   100%|██████████| 16/16 [00:31<00:00,  1.95s/prompt]
#   [16 prompts: 466 tokens in 31.3 s (14.9 tokens/s) and 37 steps, 79 % of the slots running; compilation included]
#   [19 programs in 27.0 s: 19 compiled, 0 from the compilation cache]
