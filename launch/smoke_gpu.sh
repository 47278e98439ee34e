#!/usr/bin/env bash
# Runs every stage, tiny, on one GPU: pretraining, SFT, reward model, PPO, GRPO. With flash-attn where it is installed.
#
#   launch/smoke_gpu.sh                                     about a minute
#   launch/smoke_gpu.sh hardware.device=cpu                 the same without a GPU
#   launch/smoke_gpu.sh --dry-run                           print the command
set -euo pipefail

# The virtual environment of this checkout, where there is one.
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:$PATH"
export PATH

# The first GPU only, unless one was chosen.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

exec python -m distllm.cli.supervise \
  python -m distllm pipeline pipeline=smoke hardware.device=cuda run.dir=runs/smoke_gpu "$@"
