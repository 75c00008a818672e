#!/usr/bin/env bash
# The $300 run: depth 26, 1.7 billion parameters, 27 training tokens for each one of matrices and head. By the dry run it
# takes 12.3 hours and $295 on 8 H100, from the tokenizer to the last evaluation, and 266 GB of disk.
#
#   bash runs/d26.sh --dry-run        # the plan, for this machine's GPUs or 8 H100
#   WANDB_RUN=d26 bash runs/d26.sh
#
# Everything else is as in speedrun.sh, whose other variables may be set beforehand.
set -euo pipefail

export RECIPE="runs/d26.sh" DEPTH=26 TOKEN_RATIO=27 SAVE_EVERY="${SAVE_EVERY:-2000}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../speedrun.sh" "$@"
