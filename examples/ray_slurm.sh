#!/bin/bash
# Prediction over an archive with a Ray cluster that lives as long as this job of Slurm:
#
#     sbatch --nodes=4 examples/ray_slurm.sh run/best.ckpt archive.parquet predictions 32
#
# The last number is how many GPUs are to work. A cluster that runs already needs no more than
# `gigamorph predict ... --engine ray --address HOST:6379 --devices 32`. (Written after Ray's guide for Slurm; untested.)
#SBATCH --job-name=gigamorph-ray
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
checkpoint=$1 table=$2 out=$3 actors=$4
export RAY_USAGE_STATS_ENABLED=0
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --nodes=1 --ntasks=1 --overlap -w "$first" ray start --head --port=6379 --disable-usage-stats --block &
sleep 20
if [ "$SLURM_NNODES" -gt 1 ]; then
    srun --nodes="$((SLURM_NNODES - 1))" --ntasks="$((SLURM_NNODES - 1))" --overlap --exclude="$first" \
        ray start --address="$first:6379" --disable-usage-stats --block &
fi
sleep 20
exec gigamorph predict "$checkpoint" "$table" --out "$out" --engine ray --address "$first:6379" \
    --devices "$actors" --device cuda --resume --max-failures 1%
