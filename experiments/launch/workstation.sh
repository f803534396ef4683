#!/usr/bin/env bash
# One machine with several NVIDIA GPUs: a single process drives all of them.
#
#   bash experiments/launch/workstation.sh setup                         # once, in a virtual environment
#   bash experiments/launch/workstation.sh prompts.jsonl results.jsonl
#
# Needs Python 3.11 or newer and a driver: nvidia-smi lists the GPUs.
set -euo pipefail

if [ "${1:-}" = setup ]; then
  # JAX's CUDA 13 build needs driver 580 or newer; older drivers run the CUDA 12 build.
  driver=$(nvidia-smi --id=0 --query-gpu=driver_version --format=csv,noheader)
  if [ "${driver%%.*}" -ge 580 ]; then cuda=cuda13; else cuda=cuda12; fi
  pip install -e '.[experiments]' "jax[$cuda]"
  exit
fi
INPUT=$1 OUTPUT=$2

# Once: Qwen3-30B-A3B with int8 experts, 32.5 GB instead of 61.1, converted in the memory of one layer.
[ -d qwen3-int8 ] || python -m checkpoints_convert --source=Qwen/Qwen3-30B-A3B-Instruct-2507 \
  --target=qwen3-int8 --quantize_experts=int8

# Does it fit, and how fast could it be?
python -m experiments.generate --checkpoint=qwen3-int8 --mesh=auto --num_members=16 \
  --tau=0.2 --max_new_tokens=512 --dry_run

# --mesh=auto splits the experts over all GPUs. An interrupted run resumes when rerun.
python -m experiments.generate --checkpoint=qwen3-int8 --mesh=auto --num_members=16 \
  --tau=0.2 --max_new_tokens=512 --chat --input="$INPUT" --output="$OUTPUT"

# The last command prints (here for the embedded model on eight CPU devices):
#   [mesh data:1,expert:8,tensor:1]
#   100%|██████████| 16/16 [00:31<00:00,  1.95s/prompt]
#   [16 prompts: 466 tokens in 31.3 s (14.9 tokens/s) and 37 steps, 79 % of the slots running; compilation included]
#   [19 programs in 27.0 s: 19 compiled, 0 from the compilation cache]
