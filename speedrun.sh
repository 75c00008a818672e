#!/usr/bin/env bash
# The main run: from raw text to a chat model and its report, sized to the machine it runs on. Without a GPU, and so
# perhaps without a network, it ends with the pretrained, evaluated base model of a miniature.
#
#   bash speedrun.sh                                     # 8 GPUs: depth 20; fewer: the same, longer; none: a miniature
#   DEPTH=26 WANDB_RUN=d26 bash speedrun.sh              # a larger model, logged to wandb
#
# Safe to run again: finished stages are kept, an interrupted one goes on from its last checkpoint. To start anew, move
# the work folder away or set NANOCHAT_BASE_DIR. May be set beforehand:
#   NANOCHAT_BASE_DIR  work folder (default: ~/.cache/nanochat)
#   DATASET            hub repository, local folder, or "local" for the documentation texts found on this machine
#   DEPTH NPROC        layers of the model; processes, one per GPU
#   VOCAB_SIZE         tokens of the vocabulary
#   MINUTES NUM_STEPS  horizon of pretraining (default: GPUs 10 tokens per parameter, a CPU 6 minutes)
#   SAVE_EVERY         steps between checkpoints
#   CHAT               1: mid-training, finetuning and chat evaluation too, whose data come from the hub; 0: not
#                      (default: 1 with a GPU)
#   WANDB_RUN          name of the run on wandb (default: no wandb)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
source runs/setup.sh

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
export PYTHONUNBUFFERED=1
mkdir -p "$NANOCHAT_BASE_DIR/speedrun"

# Runs a stage, `stage NAME COMMAND...`, unless it was finished with the same command before.
stage() {
    local stamp="$NANOCHAT_BASE_DIR/speedrun/$1.done"
    shift
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$*" ]; then
        echo "== finished before: $*"
        return
    fi
    echo "== $*"
    "$@" || return
    echo "$*" >"$stamp"
}

# A stage whose data cannot be had (exit status 2) says so in the report, does not stop the run, and is tried again.
optional_stage() {
    stage "$@" || [ "$?" -eq 2 ]
}

# Runs a stage script on all GPUs, or in one process.
train() {
    local script="$1"
    shift
    if [ "$NPROC" -gt 1 ]; then
        torchrun --standalone --nproc_per_node="$NPROC" -m "$script" -- "$@"
    else
        python -m "$script" "$@"
    fi
}

num_gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$num_gpus" -gt 0 ]; then
    NPROC="${NPROC:-$num_gpus}"
    DATASET="${DATASET:-karpathy/climbmix-400b-shuffle}"
    DEPTH="${DEPTH:-20}"
    VOCAB_SIZE="${VOCAB_SIZE:-32768}"
    size=(--save-every "${SAVE_EVERY:-1000}")
    core=()
    CHAT="${CHAT:-1}"
    # the shards that the model will read, from the arithmetic that also plans its training
    dry_run=(python -m scripts.base_train --dry-run --depth "$DEPTH" --vocab-size "$VOCAB_SIZE" --num-gpus "$NPROC")
    plan="$("${dry_run[@]}")"
    echo "$plan"
    num_shards="$(tail -n 1 <<<"$plan" | python -c 'import json, sys; print(json.load(sys.stdin)["num_shards"])')"
else
    NPROC="${NPROC:-1}"
    DATASET="${DATASET:-local}"
    DEPTH="${DEPTH:-4}"
    VOCAB_SIZE="${VOCAB_SIZE:-4096}" # a larger head would be most of so small a model
    size=(--sequence-len 256 --head-dim 64 --eval-every 100 --save-every "${SAVE_EVERY:-100}")
    if [ -z "${NUM_STEPS:-}" ]; then size+=(--minutes "${MINUTES:-6}"); fi
    core=(--max-per-task 20)
    CHAT="${CHAT:-0}"
    num_shards=8
fi
chat_size=()
chat_problems=()
if [ -n "${NUM_STEPS:-}" ]; then
    size+=(--num-steps "$NUM_STEPS")
    chat_size=(--num-steps "$NUM_STEPS" --max-conversations 200 --eval-tokens 4096)
    chat_problems=(--max-problems "$NUM_STEPS" --max-tokens 32)
fi
tokenizer_shards=$((num_shards < 8 ? num_shards : 8)) # 2 billion characters, what tok_train reads

# --- report: notes the machine and the time ---
stage report_reset python -m nanochat.report reset

# --- data: a few shards for the tokenizer, the rest meanwhile; 100 MB each, minutes ---
stage "data_$tokenizer_shards" python -m nanochat.dataset --data "$DATASET" -n "$tokenizer_shards"
download=""
if [ "$num_shards" -gt "$tokenizer_shards" ]; then
    stage "data_$num_shards" python -m nanochat.dataset --data "$DATASET" -n "$num_shards" &
    download=$!
fi

# --- tokenizer: 2 billion characters, a minute ---
stage tok_train python -m scripts.tok_train --data "$DATASET" --vocab-size "$VOCAB_SIZE"
stage tok_eval python -m scripts.tok_eval --data "$DATASET"
if [ -n "$download" ]; then wait "$download"; fi

# --- pretraining: an hour for depth 20 on 8 H100 by the dry run's estimate, 6 minutes for the miniature ---
tag="d$DEPTH"
stage base_train train scripts.base_train --data "$DATASET" --depth "$DEPTH" "${size[@]}" --run "${WANDB_RUN:-}" --resume

# --- evaluation of the base model: bits per byte, samples, CORE; minutes ---
stage base_loss train scripts.base_loss --model-tag "$tag"
optional_stage base_eval train scripts.base_eval --model-tag "$tag" ${core[@]+"${core[@]}"}

# --- chat: conversations, finetuning, six tasks; not yet timed on GPUs, 1 GB of data ---
chat() {
    local common=(--model-tag "$tag" --run "${WANDB_RUN:-}" --resume ${chat_size[@]+"${chat_size[@]}"})
    stage mid_train train scripts.mid_train "${common[@]}" || return
    stage chat_sft train scripts.chat_sft "${common[@]}" ${NUM_STEPS:+--chat-every 0} || return
    if ! python -c 'import sys; from nanochat.execution import isolation; sys.exit(isolation().method == "none")'; then
        echo "this system cannot isolate the code that HumanEval runs: it is left out"
        chat_problems+=(--tasks "ARC-Easy|ARC-Challenge|MMLU|GSM8K|SpellingBee")
    fi
    stage chat_eval train scripts.chat_eval -i sft --model-tag "$tag" --resume ${chat_problems[@]+"${chat_problems[@]}"}
}
source="base"
if [ "$CHAT" = 1 ]; then
    chat || [ "$?" -eq 2 ] # without the data, the base model remains
    if [ -d "$NANOCHAT_BASE_DIR/sft_checkpoints/$tag" ]; then source="sft"; fi
fi

python -m nanochat.report generate
echo "chat with it: source .venv/bin/activate; python -m scripts.chat_web --source $source --model-tag $tag"
