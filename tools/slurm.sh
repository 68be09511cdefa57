#!/bin/bash
# Run tools/train_net.py on one or several machines under Slurm; a preempted or interrupted job goes on by itself.
#
#   sbatch --nodes 2 --gpus-per-node 8 tools/slurm.sh --config-file configs/pretrain/slotcon_R_50_800ep_coco.yaml \
#       OUTPUT_DIR /shared/slotcon
#
# Arguments are those of train_net.py. --resume is added: the first job of an OUTPUT_DIR starts from the beginning, every
# later one goes on from its last checkpoint. OUTPUT_DIR, the data, DETECTRON2_DATASETS, this folder and its environment must
# be on a file system that all machines see. Partition, account, memory and time limit are your cluster's: give them to sbatch.
#
#SBATCH --job-name=d2_objssl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
# One file for a job and what is requeued of it.
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# Two minutes before the time limit, or a preemption, this script (B:) gets SIGTERM. Steps that take longer want more.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"

# Another environment: VENV=/path sbatch ...
PYTHON="${VENV:-.venv}/bin/python"
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs on one machine need different ports.
PORT=$((20000 + SLURM_JOB_ID % 20000))
PROCESSES=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

stopped=no
stop() {
    stopped=yes
    # The step, not this script: torchrun hands the signal to its processes, which write a checkpoint and end.
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap stop TERM INT

# In the background, because bash runs a trap only when the command in the foreground has ended.
srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:$PORT" --rdzv-id "$SLURM_JOB_ID" \
    tools/train_net.py --resume "$@" &
run=$!

code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends `wait` before the run has ended
    code=0
    wait "$run" || code=$?
done
if [ "$stopped" = yes ] && [ "$code" -ne 0 ]; then
    echo "Interrupted: the job is queued again and goes on from the checkpoint just written."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
