#!/bin/sh
# TPUs of a GKE cluster through XPK, in an image that has rlae-jax[tpu] and gcsfs.
#
#     sh examples/launch/xpk.sh CLUSTER IMAGE gs://BUCKET/RUN
#
# XPK restarts the workload after preemptions and after status 75 (preempted, saved).
set -eu
CLUSTER=$1 IMAGE=$2 RUN=$3

xpk workload create --cluster "$CLUSTER" --workload rlae-gsm8k --docker-image "$IMAGE" \
    --tpu-type v5litepod-32 --num-slices 1 --max-restarts 100 --restart-on-exit-codes 75 \
    --command "rlae-jax train --models Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Math-7B-Instruct --dtype bfloat16 \
        --task gsm8k --chat --max-new-tokens 256 --preset paper --span-length 4 \
        --coordinator auto --mesh data=-1,model=4 --out runs/gsm8k --checkpoints $RUN --resume"
