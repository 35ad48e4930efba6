#!/usr/bin/env bash
# slurm.sh FLAG…: a training run as a chain of Slurm jobs: each goes on from the checkpoint that the one before has left.
#
#   sbatch --nodes 4 --array 1-20%1 scripts/slurm.sh --train-data 'data/*.bin' --steps 100000 --checkpoint-every 500 --output-dir runs/a …
#
# --array 1-20%1 makes up to 20 jobs, one at a time, of the same flags. Two minutes before its time is over a job gets SIGUSR1: it saves and ends with 0, and
# the next one goes on. So does a job that was preempted (SIGTERM) or whose node failed, which Slurm puts back into the queue. When the run is complete the
# jobs that are left end at once. One rank a GPU; each sees all of its node's, as NCCL wants it, and takes its own.
#SBATCH --job-name=train_gpt_fp8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A.out
set -euo pipefail
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # what the network does wrong is told; which interface NCCL takes is the cluster's matter (NCCL_SOCKET_IFNAME)
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
status=0
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ./train_gpt_fp8 "$@" --resume || status=$?
if [ $status = 2 ] && [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then # refused input: the jobs that follow would be refused too
    scancel "$SLURM_ARRAY_JOB_ID"
fi
exit $status
