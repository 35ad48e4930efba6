#!/usr/bin/env bash
# pretrain_13b.sh [FLAG…]: FP8-LM's GPT-13B (Table 1), 100 billion tokens on 32 H100s, two of which share each layer.
#
#   DRY_RUN=1 scripts/pretrain_13b.sh                                  the plan, its cost and the command; runs nothing
#   TOY=1 scripts/pretrain_13b.sh                                      the same layout with a small model, on this machine's cores
#   DATA='data/*.bin' HOSTFILE=hosts scripts/pretrain_13b.sh           4 nodes of 8 GPUs, by mpirun
#   DATA='data/*.bin' sbatch --array 1-20%1 scripts/pretrain_13b.sh    the same in Slurm jobs, each of which goes on where the one before ended
#
# FLAGs go to the trainer and win. More can be set: scripts/pretrain.sh.
#
# Planned for 32 H100s by DRY_RUN=1 GPU=h100, not measured; times are at best: no kernel and no network is faster. The paper measured 249k tok/s (Table 5,
# FP8, micro-batch 4), which makes 3,570 GPU hours.
#   RECIPE=fp8       38.0 GiB a GPU, 543k tok/s, 1,636 GPU hours, $4,089 at $2.50 each
#   RECIPE=fp8-lm    32.7 GiB,       512k tok/s, 1,737 GPU hours, $4,343
#   RECIPE=bf16      50.2 GiB,       328k tok/s, 2,710 GPU hours, $6,774; micro-batch 2
#SBATCH --job-name=gpt-13b --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=12:00:00 --signal=USR1@120 --requeue --open-mode=append --output=slurm-%x-%A.out
name=13b paper_gpus=32
cd "$(dirname "$0")/.." && [ -e scripts/pretrain.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit # Slurm runs a copy of this file
. scripts/pretrain.sh

micro_batch=4 # the paper's (Table 5) in FP8, and in BF16
[ "$RECIPE" != bf16 ] || micro_batch=2

pretrain --layers 40 --heads 40 --width 5120 --position rope --seq-len 2048 --vocab 50257 \
    --tp 2 --pp 1 --micro-batch $micro_batch --global-batch 4194304 --steps 23842 \
    --lr 3e-4 --warmup 1000 --lr-schedule cosine --min-lr-frac 0.1 --weight-decay 0.1 --beta1 0.9 --beta2 0.95 --clip 1 \
    -- "$@"
