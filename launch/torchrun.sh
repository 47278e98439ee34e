#!/usr/bin/env bash
# Trains under torchrun, on one node or many. The same command runs on every node.
#
#   launch/torchrun.sh run.dir=runs/a engine=ddp                                     all GPUs of this machine
#   NPROC_PER_NODE=2 launch/torchrun.sh run.dir=runs/a engine=ddp                    2 processes, with or without GPUs
#   NNODES=2 RDZV_ENDPOINT=host0:29400 launch/torchrun.sh run.dir=/shared/a engine=fsdp        on both nodes
#   launch/torchrun.sh --dry-run run.dir=runs/a                                      print the command, start nothing
#
# Variables: NNODES, NPROC_PER_NODE, RDZV_ENDPOINT, RDZV_ID, RDZV_CONF, LOCAL_ADDR, MAX_RESTARTS, VERB (train or pipeline).
# Where Kubeflow sets its PET_ variables, they fill in. Where a machine's name does not resolve to the address that the
# others reach it at: LOCAL_ADDR=that address, and RDZV_CONF=is_host=1 on the host of RDZV_ENDPOINT, is_host=0 elsewhere.
# Time-outs of collectives are engine.timeout_s and engine.long_timeout_s.
set -euo pipefail

# The virtual environment of this checkout, where there is one.
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:$PATH"
export PATH

# One thread per process: torchrun would set 1 with a warning, and without it every process would start a thread per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A failed or late NCCL collective ends the process (after its time-out) instead of hanging it for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# The flight recorder keeps the last collectives, and a time-out writes them down: which rank lagged, and in what.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# A restart must not find the addresses of the dead in the agent's store: measured on gloo, with the shared store 4 of 8
# restarts came up at once, with a store of their own 8 of 8.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
# If the agent itself is signalled (Slurm signals every process of a step), a save may take this long before SIGKILL.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}"

# SIGUSR1 among the handled signals: by default it kills the agent and leaves its workers behind.
exec python -m distllm.cli.supervise \
  python -m torch.distributed.run \
  --nnodes="${NNODES:-${PET_NNODES:-1}}" \
  --nproc-per-node="${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-auto}}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="${RDZV_ENDPOINT:-${PET_MASTER_ADDR:-localhost}:${PET_MASTER_PORT:-0}}" \
  --rdzv-id="${RDZV_ID:-distllm}" \
  ${RDZV_CONF:+--rdzv-conf="$RDZV_CONF"} \
  ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} \
  --max-restarts="${MAX_RESTARTS:-3}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m distllm "${VERB:-train}" "$@"
