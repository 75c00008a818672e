#!/usr/bin/env bash
# The $300 run: depth 26, 1.7 billion parameters, 20 training tokens for each one of matrices and head. By the dry run,
# pretraining takes 8.35 hours and $200 on 8 H100; the rest is left for chat, evaluation, and a speed below the assumed
# one. It also needs 206 GB of disk.
#
#   bash runs/d26.sh --dry-run        # the plan, for this machine's GPUs or 8 H100
#   WANDB_RUN=d26 bash runs/d26.sh
#
# Everything else is as in speedrun.sh, whose other variables may be set beforehand.
set -euo pipefail

export RECIPE="runs/d26.sh" DEPTH=26 TOKEN_RATIO=20 SAVE_EVERY="${SAVE_EVERY:-2000}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../speedrun.sh" "$@"
