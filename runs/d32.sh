#!/usr/bin/env bash
# The $1,000 run: depth 32, 2.8 billion parameters, 29 training tokens for each one of matrices and head. By the dry run
# it takes 41.2 hours and $988 on 8 H100 of 80 GB, from the tokenizer to the last evaluation, and 461 GB of disk.
#
#   bash runs/d32.sh --dry-run        # the plan, for this machine's GPUs or 8 H100
#   WANDB_RUN=d32 bash runs/d32.sh
#
# Everything else is as in speedrun.sh, whose other variables may be set beforehand.
set -euo pipefail

export RECIPE="runs/d32.sh" DEPTH=32 TOKEN_RATIO=29 SAVE_EVERY="${SAVE_EVERY:-2000}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../speedrun.sh" "$@"
