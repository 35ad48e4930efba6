#!/usr/bin/env bash
# pretrain_125m.sh [FLAG…]: FP8-LM's GPT-125M (Table 1), 100 billion tokens; the paper does not say on how many GPUs.
#
#   DRY_RUN=1 scripts/pretrain_125m.sh                                  the plan, its cost and the command; runs nothing
#   TOY=1 scripts/pretrain_125m.sh                                      the same layout with a small model, on this machine's cores
#   DATA='data/*.bin' HOSTFILE=hosts scripts/pretrain_125m.sh           8 GPUs of one node, by mpirun
#   DATA='data/*.bin' sbatch --array 1-20%1 scripts/pretrain_125m.sh    the same in Slurm jobs, each of which goes on where the one before ended
#
# FLAGs go to the trainer and win. More can be set: scripts/pretrain.sh.
#
# Planned for 8 H100s by DRY_RUN=1 GPU=h100, not measured; times are at best: no kernel and no network is faster.
#   RECIPE=fp8       7.6 GiB a GPU, 7.4M tok/s,  30 GPU hours, $75 at $2.50 each
#   RECIPE=fp8-lm    7.5 GiB,       7.2M tok/s,  31 GPU hours, $77
#   RECIPE=bf16      8.4 GiB,       6.0M tok/s,  37 GPU hours, $92
#SBATCH --job-name=gpt-125m --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=12:00:00 --signal=USR1@120 --requeue --open-mode=append --output=slurm-%x-%A.out
name=125m paper_gpus=8
cd "$(dirname "$0")/.." && [ -e scripts/pretrain.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit # Slurm runs a copy of this file
. scripts/pretrain.sh

pretrain --layers 12 --heads 12 --width 768 --position rope --seq-len 2048 --vocab 50257 \
    --tp 1 --pp 1 --micro-batch 16 --global-batch 1048576 --steps 95367 \
    --lr 6e-4 --warmup 1000 --lr-schedule cosine --min-lr-frac 0.1 --weight-decay 0.1 --beta1 0.9 --beta2 0.95 --clip 1 \
    -- "$@"
