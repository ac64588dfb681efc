#!/bin/sh
#SBATCH --job-name=rlae-gsm8k
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Several nodes with several GPUs each: a process per GPU, which find each other by Slurm's variables.
#
#     sbatch examples/launch/slurm.sh /shared/runs/gsm8k
#
# Five minutes before the time is up, and on preemption, the processes save and end with status 75; the job then goes
# back into the queue and on from there. RUN is on a file system that all nodes have.
set -u
RUN=$1

srun rlae-jax train --models Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Math-7B-Instruct --dtype bfloat16 \
    --task gsm8k --chat --max-new-tokens 256 --preset paper --span-length 4 \
    --coordinator auto --mesh data=-1,model=2 --out "$RUN" --resume
status=$?
[ "$status" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
