#!/bin/sh
# One TPU VM (up to 8 chips): one process drives them all.
#
#     sh examples/launch/tpu_vm.sh NAME ZONE gs://BUCKET/RUN
#
# After a preemption (`gcloud compute tpus tpu-vm list` says PREEMPTED), delete the VM and repeat the call: the run goes
# on from its newest checkpoint in the bucket. The VM's service account has to be allowed to write there.
set -eu
NAME=$1 ZONE=$2 RUN=$3

gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type v5litepod-8 \
    --version v2-alpha-tpuv5-lite --spot
gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --command "
    pip install --quiet 'rlae-jax[tpu]' gcsfs &&
    ~/.local/bin/rlae-jax train --models Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Math-7B-Instruct --dtype bfloat16 \
        --task gsm8k --chat --max-new-tokens 256 --preset paper --span-length 4 \
        --mesh data=-1,model=4 --out runs/gsm8k --checkpoints $RUN --resume"
