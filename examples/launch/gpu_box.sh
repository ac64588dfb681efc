#!/bin/sh
# One machine with one GPU or several: one process drives them all.
#
#     sh examples/launch/gpu_box.sh [RUN]
#
# Repeat the call after whatever stopped it. Status 75 (preempted, saved) is repeated here.
set -u
RUN=${1:-runs/gsm8k}

pip install --quiet 'rlae-jax[cuda]' || exit
while :; do
    rlae-jax train --models Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Math-7B-Instruct --dtype bfloat16 \
        --task gsm8k --chat --max-new-tokens 256 --preset paper --span-length 4 \
        --mesh data=-1,model=1 --out "$RUN" --resume
    status=$?
    [ "$status" -eq 75 ] || exit "$status"
done
