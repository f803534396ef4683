#!/usr/bin/env bash
# A slice of a TPU pod: the same program on all of its hosts, which find each other.
#
#   TPU=my-slice ZONE=us-west4-a bash experiments/launch/tpu_pod.sh setup   # once, from the repository
#   TPU=my-slice ZONE=us-west4-a bash experiments/launch/tpu_pod.sh         # again after a preemption
#
# The slice was made with, for 16 chips on 4 hosts:
#   gcloud compute tpus tpu-vm create $TPU --zone=$ZONE --accelerator-type=v5litepod-16 \
#     --version=v2-alpha-tpuv5-lite
# MODELS is a folder that all hosts see under the same path (Filestore, or a bucket mounted with
# gcsfuse), with the converted checkpoint and the prompts. Host 0 reads prompts and writes results.
set -euo pipefail
MODELS=${MODELS:-/mnt/models}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [ "${1:-}" = setup ]; then
  gcloud compute tpus tpu-vm scp --recurse --zone="$ZONE" --worker=all . "$TPU":roe_jax
  everywhere "cd roe_jax && pip install -e . 'jax[tpu]'"
  exit
fi

# Mixtral-8x7B in bfloat16: 93 GB, of which each of the 16 chips holds about 7.
everywhere "cd roe_jax && python3 -m experiments.generate --distributed --mesh=auto \
  --checkpoint=$MODELS/mixtral --num_members=16 --temperature_profile=0.2 --max_new_tokens=512 \
  --input=$MODELS/prompts.jsonl --output=$MODELS/results.jsonl"

# What host 0 prints (here of the embedded model, two processes with four devices of a CPU each):
#   [waiting up to 300 s for the other processes]
#   [process 0 of 2: 4 of 8 devices]
#   [mesh data:1,expert:8,tensor:1]
#   100%|██████████| 16/16 [00:50<00:00,  3.13s/prompt]
#   [16 prompts: 466 tokens in 50.1 s (9.3 tokens/s) and 37 steps, 79 % of the slots running; compilation included]
#   [29 programs in 40.0 s: 29 compiled, 0 from the compilation cache]
# The others print the first two lines. Where a host is lost, all end with an error within a minute.
