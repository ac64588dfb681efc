#!/bin/sh
# A TPU pod slice of several hosts through queued resources: one process per host, which find each other by themselves.
#
#     sh examples/launch/tpu_pod.sh NAME ZONE gs://BUCKET/RUN
#
# Asks for the slice again after every preemption, until the run is complete. Keep it running (tmux, a small VM).
set -u
NAME=$1 ZONE=$2 RUN=$3

state() {
    gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)' 2>/dev/null
}

while :; do
    if [ "$(state)" != ACTIVE ]; then
        gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet 2>/dev/null
        gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" --spot \
            --accelerator-type v5litepod-32 --runtime-version v2-alpha-tpuv5-lite || exit
        until [ "$(state)" = ACTIVE ]; do sleep 60; done
        gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all \
            --command "pip install --quiet 'rlae-jax[tpu]' gcsfs" || continue
    fi
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "
        ~/.local/bin/rlae-jax train --models Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Math-7B-Instruct --dtype bfloat16 \
            --task gsm8k --chat --max-new-tokens 256 --preset paper --span-length 4 \
            --coordinator auto --mesh data=-1,model=4 --out runs/gsm8k --checkpoints $RUN --resume"
    status=$?
    # 75: preempted, saved. While the slice is gone any other failure is the preemption's, too.
    [ "$status" -eq 0 ] && exit
    [ "$status" -eq 75 ] || [ "$(state)" != ACTIVE ] || exit "$status"
done
