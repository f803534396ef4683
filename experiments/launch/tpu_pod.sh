#!/usr/bin/env bash
# A TPU slice: runs the same program on all of its hosts, which find each other.
#
#   export TPU=my-slice ZONE=us-west4-a
#   bash experiments/launch/tpu_pod.sh create   # request 16 chips on 4 hosts
#   bash experiments/launch/tpu_pod.sh setup    # once the slice is ACTIVE, from the repository
#   bash experiments/launch/tpu_pod.sh          # run; run again after a preemption
#
# v5e by default. For v6e:
#   export TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e ZONE=us-east5-b
# MODELS is a folder that all hosts see under the same path (Filestore, or a bucket mounted with
# gcsfuse). It holds the converted checkpoint and the prompts. Host 0 reads prompts and writes
# results.
set -euo pipefail
MODELS=${MODELS:-/mnt/models}
TYPE=${TYPE:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-run}" in
create)
  # Waits in Google's queue until chips are free; add --spot for preemptible ones.
  gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
  echo "wait for ACTIVE: gcloud compute tpus queued-resources describe $TPU --zone=$ZONE"
  echo "delete it later: gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force"
  ;;
setup)
  # Tracked files only: no .git, virtual environments or results.
  archive=$(mktemp -d)/roe_jax.tar.gz
  git ls-files -z | tar --null -czf "$archive" -T -
  gcloud compute tpus tpu-vm scp "$archive" "$TPU": --zone="$ZONE" --worker=all
  # The TPU image has Python 3.10, which is too old; uv brings its own 3.12.
  on_all_hosts "mkdir -p roe_jax && tar -xzf roe_jax.tar.gz -C roe_jax && cd roe_jax \
    && curl -LsSf https://astral.sh/uv/install.sh | sh \
    && ~/.local/bin/uv venv --clear --python 3.12 \
    && ~/.local/bin/uv pip install -e '.[experiments]' 'jax[tpu]'"
  ;;
run)
  # JAX reads the addresses of the hosts from the metadata server. Its default coordinator port,
  # 8482 since 0.8.1, is not among those that the firewall rule of a slice opens between hosts;
  # 8476 is.
  # Mixtral-8x7B in bfloat16: 93 GB, about 7 GB on each of the 16 chips.
  on_all_hosts "cd roe_jax && JAX_COORDINATOR_PORT=8476 .venv/bin/python -m experiments.generate \
    --distributed --mesh=auto --checkpoint=$MODELS/mixtral --num_members=16 \
    --tau=0.2 --max_new_tokens=512 \
    --input=$MODELS/prompts.jsonl --output=$MODELS/results.jsonl"
  ;;
*)
  echo "got $1, expected create, setup, or nothing to run" >&2
  exit 2
  ;;
esac

# Host 0 prints (here for the embedded model on two processes with four CPU devices each):
#   [waiting up to 300 s for the other processes]
#   [process 0 of 2: 4 of 8 devices]
#   [mesh data:1,expert:8,tensor:1]
#   100%|██████████| 16/16 [00:50<00:00,  3.13s/prompt]
#   [16 prompts: 466 tokens in 50.1 s (9.3 tokens/s) and 37 steps, 79 % of the slots running; compilation included]
#   [29 programs in 40.0 s: 29 compiled, 0 from the compilation cache]
# The other hosts print the first two lines. If a host is lost, all stop with an error within a
# minute.
