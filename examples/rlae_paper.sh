#!/bin/sh
# RLAE in the paper's own setting on one 80 GB device: two 7B instruct models, GSM8K, spans of 4, the published
# hyperparameters, three seeds one after another. Memory and time: rlae_paper.md.
#
#     sh examples/rlae_paper.sh [MODEL_A MODEL_B [RUNS]]
#
# A call that was stopped is repeated as it was: it goes on from the newest checkpoint.
set -eu

A=${1:-Qwen/Qwen2.5-7B-Instruct}
B=${2:-Qwen/Qwen2.5-Math-7B-Instruct}
RUNS=${3:-runs/paper}
NEW=${NEW:-256} # the longest answer

# Of a device's memory JAX takes three quarters by default.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.93

for seed in 0 1 2; do
    if [ ! -f "$RUNS/seed-$seed/results.json" ]; then
        rlae-jax train --models "$A" "$B" --dtype bfloat16 \
            --task gsm8k --chat --max-new-tokens "$NEW" \
            --preset paper --span-length 4 --algo ppo \
            --seed "$seed" --out "$RUNS/seed-$seed" --resume
    fi
done

# The test split is read once, when all choices are made. Searched baselines are left out: see rlae_paper.md.
rlae-jax evaluate --models "$A" "$B" --dtype bfloat16 \
    --task gsm8k --chat --max-new-tokens "$NEW" --split test \
    --methods "single:$(basename "$A")" "single:$(basename "$B")" uniform \
    --policy "$RUNS/seed-0" "$RUNS/seed-1" "$RUNS/seed-2" --out "$RUNS/test"
