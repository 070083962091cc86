#!/bin/bash
# Prediction over an archive as an array of Slurm, a shard and a GPU for each task:
#
#     sbatch --array=1-64 examples/slurm_array.sh run/best.ckpt archive.parquet predictions 64
#
# Tasks that were ended, or failed, are submitted again as they were (--array=7,12): what is done is not done again. The
# task that ends last writes predictions.csv. The folder lies on a file system that all nodes see and that has locks.
#SBATCH --job-name=gigamorph-predict
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
checkpoint=$1 table=$2 out=$3 shards=$4
exec gigamorph predict "$checkpoint" "$table" --out "$out" \
    --shard "$SLURM_ARRAY_TASK_ID/$shards" --resume --max-failures 1% --json
