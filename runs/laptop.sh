#!/usr/bin/env bash
# The stages of the full run on its own data sets, small enough for two cores of a CPU and half an hour: depth 4, ten
# minutes of pretraining on web text, parts of the conversations, reinforcement learning on words to spell and letters to
# count. Needs the hub: the text alone is 0.9 GB. It writes English and knows letters, no more: for a chat, take speedrun.sh.
#
#   bash runs/laptop.sh
#   BASE_STEPS=2700 DEPTH=6 bash runs/laptop.sh     # longer and larger, on a faster machine
#
# Everything else is as in speedrun.sh, whose other variables may be set beforehand.
set -euo pipefail

if [ "${1:-}" = --dry-run ]; then
    echo "nothing to plan: this run has BASE_STEPS=450 steps of pretraining, takes half an hour in all, and uses no GPU" >&2
    exit 2
fi
export CUDA_VISIBLE_DEVICES="" # the same small model on any machine
export DATASET="${DATASET:-karpathy/climbmix-400b-shuffle}" CHAT_DATA=mixture
export VOCAB_SIZE="${VOCAB_SIZE:-4096}" BASE_STEPS="${BASE_STEPS:-450}"
export PRETRAIN_FLAGS="--sequence-len 512 --total-batch-size 8192 ${PRETRAIN_FLAGS:-}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../speedrun.sh" "$@"
