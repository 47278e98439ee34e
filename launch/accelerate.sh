#!/usr/bin/env bash
# Trains under `accelerate launch`, laid out as a file of `accelerate config` says.
#
#   launch/accelerate.sh run.dir=runs/a engine=accelerate                                     launch/accelerate.yaml
#   ACCELERATE_CONFIG=launch/accelerate_8gpu.yaml launch/accelerate.sh run.dir=runs/a engine=accelerate
#   launch/accelerate.sh --dry-run run.dir=runs/a                                             print the command
#
# Variables: ACCELERATE_CONFIG, VERB (train or pipeline). Without GPUs `accelerate launch` starts one process (more need
# MPI): for several on CPUs, torchrun.sh runs engine=accelerate as well.
set -euo pipefail

# The virtual environment of this checkout, where there is one.
here="$(dirname "${BASH_SOURCE[0]}")"
PATH="$here/../.venv/bin:$PATH"
export PATH

# One thread per process: accelerate would choose a number by itself.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A failed or late NCCL collective ends the process (after its time-out) instead of hanging it for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# The flight recorder keeps the last collectives, and a time-out writes them down: which rank lagged, and in what.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# A restart must not find the addresses of the dead in the agent's store (see torchrun.sh).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

exec python -m distllm.cli.supervise \
  accelerate launch \
  --config_file "${ACCELERATE_CONFIG:-$here/accelerate.yaml}" \
  -m distllm "${VERB:-train}" "$@"
