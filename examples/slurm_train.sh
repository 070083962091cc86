#!/bin/bash
# Training over nodes: torchrun on each node starts a process for each GPU.
#
#     sbatch --nodes=2 examples/slurm_train.sh table.csv run --model resnet50 --epochs 20 --devices-per-image 4
#
# When a process ends, all are started anew from run/last.ckpt, three times at most; the job that Slurm starts again after
# the loss of a node goes on there as well. (Tested on one machine as two nodes with two processes each, on CPUs.)
#SBATCH --job-name=gigamorph-train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=72:00:00
#SBATCH --requeue
set -euo pipefail
table=$1 out=$2
shift 2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun python -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --max-restarts 3 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    -m gigamorph.cli.main train "$table" --out "$out" --timeout 2h "$@"
