#!/bin/bash
# One run over several nodes of a Slurm cluster: a launcher on each node, a static rendezvous at the first one.
#
#     sbatch examples/cluster/slurm.sh examples/demo.toml out=runs/cluster
#
# The folder of submission must be on a file system that all nodes see, or out and cache must be (docs/guides/cluster.md).
#SBATCH --job-name=fedmoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# For GPUs add: #SBATCH --gpus-per-node=4
set -euo pipefail

RANKS_PER_NODE="${RANKS_PER_NODE:-4}" # at most the GPUs of a node, where it has any
RESTARTS="${RESTARTS:-2}"             # how often torchrun starts the ranks again after a failure

# sed reads to the end: with head, a scontrol that still writes dies of a closed pipe, and the job with it (status 141).
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR="$first" RANKS_PER_NODE RESTARTS
# Two jobs on one node must not meet; from 32768 on Linux hands ports to outgoing connections.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$RANKS_PER_NODE} / RANKS_PER_NODE))}"
# Set these to the interface of the private network, where a node has several.
# export GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME=eth1

# Expanded on each node: the number of the node is known there alone.
# shellcheck disable=SC2016
launch='exec torchrun --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts="$RESTARTS" \
    -m fedmoe_core.cli simulate "$@" ranks=$((SLURM_NNODES * RANKS_PER_NODE))'
srun --kill-on-bad-exit=1 bash -c "$launch" fedmoe "$@"
