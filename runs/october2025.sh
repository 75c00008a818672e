#!/usr/bin/env bash
# The first public release's $100 run, of October 2025: its architecture at depth 20 (561 million parameters), 65,536
# tokens of vocabulary, FineWeb-Edu, 20 training tokens for every parameter, its batch and its schedule. By the dry run it
# takes 3.7 hours and $90 on 8 H100, from the tokenizer to the last evaluation (that release: 3 h 51 min), and 64 GB of disk.
#
#   bash runs/october2025.sh --dry-run        # the plan, for this machine's GPUs or 8 H100
#   bash runs/october2025.sh
#
# The optimizer and the rates of embeddings (0.3) and head (0.008) are ours; there they were 0.2 and 0.004. It works in a
# folder of its own, as it has another tokenizer. Everything else is as in speedrun.sh.
set -euo pipefail

export RECIPE="runs/october2025.sh" DEPTH=20 VOCAB_SIZE=65536 TOKEN_RATIO=20 SAVE_EVERY="${SAVE_EVERY:-4000}"
export DATASET="${DATASET:-karpathy/fineweb-edu-100b-shuffle}"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat-october2025}"
export PRETRAIN_FLAGS="--arch october-2025 --total-batch-size 524288 --warmup-steps 0 --warmdown-frac 0.2 \
--final-lr-frac 0 --weight-decay 0 ${PRETRAIN_FLAGS:-}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../speedrun.sh" "$@"
