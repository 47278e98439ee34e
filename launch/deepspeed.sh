#!/usr/bin/env bash
# Trains under the deepspeed launcher, on this machine or on all hosts of a hostfile (over ssh and pdsh).
#
#   launch/deepspeed.sh run.dir=runs/a engine=deepspeed engine.zero_stage=2                   all GPUs of this machine
#   NPROC_PER_NODE=2 launch/deepspeed.sh run.dir=runs/a engine=deepspeed                      2 processes
#   HOSTFILE=hosts launch/deepspeed.sh run.dir=/shared/a engine=deepspeed engine.zero_stage=3
#   launch/deepspeed.sh --dry-run run.dir=runs/a                                              print the command
#
# A hostfile has one line per machine, such as `host0 slots=8`. Start on its first host, which then is the one to signal.
# Variables: HOSTFILE, NPROC_PER_NODE, MASTER_PORT, VERB (train or pipeline). deepspeed starts nothing anew after a
# failure: for restarts use torchrun.sh, which runs engine=deepspeed as well.
set -euo pipefail

# The virtual environment of this checkout, where there is one.
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:$PATH"
export PATH

# One thread per process: without it every process would start a thread per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A failed or late NCCL collective ends the process (after its time-out) instead of hanging it for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# The flight recorder keeps the last collectives, and a time-out writes them down: which rank lagged, and in what.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

exec python -m distllm.cli.supervise \
  deepspeed \
  --hostfile="${HOSTFILE:-/job/hostfile}" \
  --num_gpus="${NPROC_PER_NODE:--1}" \
  --master_port="${MASTER_PORT:-29500}" \
  --module distllm "${VERB:-train}" "$@"
