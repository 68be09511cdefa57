#!/bin/bash
# Run tools/train_net.py under Slurm, on one or several machines; a job that is preempted or runs out of time goes on by itself.
#
#   sbatch --nodes 2 tools/slurm.sh --config-file configs/pretrain/slotcon_R_50_800ep_coco.yaml OUTPUT_DIR /shared/slotcon
#
# The arguments are those of train_net.py. --resume is added: the first job of an OUTPUT_DIR starts from the beginning, later
# ones go on from its last checkpoint. OUTPUT_DIR, the images, region maps, this folder and its environment must be on file
# systems that all machines see. Partition, account, memory and time limit are those of your cluster: give them to sbatch.
#
#SBATCH --job-name=d2_objssl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
# One file for a job and all that it is when it is queued again.
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# Two minutes before the time limit this script (B:) gets SIGTERM: enough for a step and a checkpoint, or give more.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue

set -euo pipefail
# Slurm runs a copy of this file from elsewhere. Another environment than .venv: VENV=/path sbatch ...
cd "${SLURM_SUBMIT_DIR:?is set by sbatch, which is to start this script}"
python="${VENV:-.venv}/bin/python"

# An array, not a pipe into `head`, whose end could stop scontrol by SIGPIPE.
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# By the job: two on one machine need different ports.
address="tcp://${machines[0]}:$((20000 + SLURM_JOB_ID % 20000))"

terminated=no
terminate() {
    terminated=yes
    # All processes of the step, on all machines; not this script.
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap terminate TERM

# One launcher on each machine, which starts a process for each GPU. In the background: bash would put off the trap.
# shellcheck disable=SC2016  # the number of a machine is known there only
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c \
    'exec "$1" tools/train_net.py --machine-rank "$SLURM_NODEID" "${@:2}"' bash "$python" \
    --num-gpus "${SLURM_GPUS_ON_NODE:-1}" --num-machines "$SLURM_JOB_NUM_NODES" --dist-url "$address" --resume "$@" &
step=$!

code=0
wait "$step" || code=$?
if [ "$terminated" = yes ]; then # the signal ended `wait`, not the step
    code=0
    wait "$step" || code=$?
    if [ "$code" -eq 143 ]; then # stopped by SIGTERM: neither finished nor failed
        echo "A checkpoint was written; the job is queued again and goes on from there."
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
