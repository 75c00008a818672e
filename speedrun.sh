#!/usr/bin/env bash
# The main run: from raw text to a chat model and its report, sized to the machine it runs on. Without a GPU it trains a
# miniature in less than 20 minutes and without a network: the same stages, pretrained on documentation found on this
# machine, for a model that chats about a small world (tasks/small_world/).
#
#   bash speedrun.sh                                     # 8 GPUs: depth 24, 4.2 hours, $100 (estimate); fewer: longer
#   bash speedrun.sh --dry-run                           # what it takes on GPUs: tokens, disk, memory, hours, dollars
#   DEPTH=20 WANDB_RUN=d20 bash speedrun.sh              # a smaller model, logged to wandb
#   bash runs/d26.sh                                     # runs/: recipes for other budgets, with the same options
#   bash runs/laptop.sh                                  # half an hour without a GPU, on the full run's data sets
#
# Safe to run again: finished stages are kept, and an interrupted one continues from its last checkpoint. To start anew,
# move the work folder away or set NANOCHAT_BASE_DIR. These variables may be set beforehand:
#   NANOCHAT_BASE_DIR  work folder (default: ~/.cache/nanochat)
#   DATASET            hub repository, local folder, or "local" for the documentation texts found on this machine
#   DEPTH NPROC        layers of the model (default on GPUs: 24, or what fits); processes, one per GPU (a dry run
#                      without GPUs assumes 8)
#   GPU                kind of GPU for a dry run (default: this machine's, or H100)
#   VOCAB_SIZE         tokens of the vocabulary
#   NUM_STEPS          steps of every training stage, to try it out
#   TOKEN_RATIO        training tokens per parameter of matrices and head (default on GPUs: 12)
#   BASE_STEPS         steps of pretraining, without a GPU only (default: 170); every stage says how long its steps take
#   PRETRAIN_FLAGS     further flags of scripts.base_train, which win over those here
#   SAVE_EVERY         steps between checkpoints
#   CHAT               0 stops after the base model (default: 1, mid-training, finetuning and chat evaluation follow)
#   CHAT_DATA          "mixture" of data sets from the hub (default with a GPU), or "small_world", generated
#   RL                 1 adds reinforcement learning: on GSM8K, or without a GPU, where it is the default, on spelling
#   WANDB_RUN          name of the run on wandb (default: no wandb)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"

dry_run=0
for argument in "$@"; do
    case "$argument" in
    --dry-run) dry_run=1 ;;
    -h | --help)
        sed -n '2,/^[^#]/ s/^# \{0,1\}//p' speedrun.sh
        exit
        ;;
    *)
        echo "unknown argument $argument: there are --dry-run and --help, the rest is set by variables (see --help)" >&2
        exit 2
        ;;
    esac
done

source runs/setup.sh

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
export PYTHONUNBUFFERED=1

# Runs a stage, `stage NAME COMMAND...`, unless it was finished with the same command before, and, where the variable
# `after` names a stage, that one was not run again since: what is evaluated has to be the model that it left.
stage() {
    local stamp="$NANOCHAT_BASE_DIR/speedrun/$1.done" before="$NANOCHAT_BASE_DIR/speedrun/${after:-}.done"
    shift
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$*" ] && ! [ "$before" -nt "$stamp" ]; then
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

# --- sizes ---
num_gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
read -ra pretrain_flags <<<"${PRETRAIN_FLAGS:-}"
horizon=()
if [ "$num_gpus" -gt 0 ] || [ "$dry_run" = 1 ]; then TOKEN_RATIO="${TOKEN_RATIO:-12}"; fi
if [ -n "${NUM_STEPS:-}" ]; then
    horizon=(--num-steps "$NUM_STEPS")
elif [ -n "${TOKEN_RATIO:-}" ]; then
    horizon=(--token-ratio "$TOKEN_RATIO")
fi
if [ "$num_gpus" -gt 0 ] || [ "$dry_run" = 1 ]; then
    NPROC="${NPROC:-$((num_gpus > 0 ? num_gpus : 8))}"
    DATASET="${DATASET:-karpathy/climbmix-400b-shuffle}"
    VOCAB_SIZE="${VOCAB_SIZE:-32768}"
    size=()
    SAVE_EVERY="${SAVE_EVERY:-1000}"
    bpb=()
    core=()
    CHAT_DATA="${CHAT_DATA:-mixture}"
    RL="${RL:-0}"
    # The plan says which shards the model will read, and whether it fits; without DEPTH, the deepest model that does.
    for DEPTH in ${DEPTH:-24 20 16 12 8}; do
        plan="$(python -m scripts.base_train --dry-run --depth "$DEPTH" --vocab-size "$VOCAB_SIZE" --num-gpus "$NPROC" \
            ${GPU:+--gpu "$GPU"} --save-every "$SAVE_EVERY" ${horizon[@]+"${horizon[@]}"} \
            ${pretrain_flags[@]+"${pretrain_flags[@]}"})"
        read -r num_shards fits < <(tail -n 1 <<<"$plan" | python -c \
            'import json, sys; plan = json.load(sys.stdin); print(plan["num_shards"], plan.get("fits"))')
        if [ "$fits" != False ]; then break; fi
    done
    echo "${plan%$'\n'*}"
    if [ "$dry_run" = 1 ]; then exit; fi
elif [ -n "${RECIPE:-}" ]; then
    echo "$RECIPE needs GPUs, and this machine has none; --dry-run says what it takes" >&2
    exit 2
else
    NPROC="${NPROC:-1}"
    DATASET="${DATASET:-local}"
    DEPTH="${DEPTH:-4}"
    VOCAB_SIZE="${VOCAB_SIZE:-1024}" # words of few letters to a token, whose letters can be learned
    size=(--sequence-len 256 --head-dim 64 --window-pattern L --eval-every 100)
    SAVE_EVERY="${SAVE_EVERY:-100}"
    # Steps and not minutes, so that a busy machine takes longer and trains the same model.
    if [ -z "${TOKEN_RATIO:-}" ]; then horizon=(--num-steps "${NUM_STEPS:-${BASE_STEPS:-170}}" --total-batch-size 4096); fi
    bpb=(--split-tokens 131072)
    core=(--max-per-task 20)
    CHAT_DATA="${CHAT_DATA:-small_world}"
    RL="${RL:-1}"
    num_shards=8
fi
chat_tasks="ARC-Easy|ARC-Challenge|MMLU|GSM8K|HumanEval|SpellingBee"
chat_problems=()
mid_size=()
sft_size=()
rl_size=(--tasks GSM8K)
if [ "$CHAT_DATA" = small_world ]; then
    chat_tasks="small_world"
    chat_problems=(--batch-rows 32 --max-tokens 64)
    mid_size=(--data small_world --total-batch-size 2048 --eval-every 500 --lr-mult 1.2 --final-lr-frac 0.3)
    sft_size=(--data small_world --total-batch-size 2048 --eval-every 500 --lr-mult 0.36)
    rl_size=(--tasks SmallWorld-spelling --num-steps 40 --max-tokens 32 --lr-mult 0.1)
    rl_size+=(--eval-every 40 --eval-questions 320 --eval-samples 4)
elif [ "$num_gpus" -eq 0 ]; then # a part of the conversations, and words to spell, as it gets no problem of GSM8K right
    chat_tasks+="|Spelling"
    chat_problems=(--max-problems 500 --max-tokens 256)
    mid_size=(--total-batch-size 4096 --max-conversations 16000)
    sft_size=(--total-batch-size 4096 --max-conversations 8000 --lr-mult 0.3 --chat-max-problems 64)
    rl_size=(--tasks "Spelling|SpellingBee" --num-steps 60 --max-tokens 128 --lr-mult 0.3 --eval-samples 4)
fi
if [ -n "${NUM_STEPS:-}" ]; then # these win over those before
    trial=(--num-steps "$NUM_STEPS" --max-conversations 200 --eval-tokens 4096)
    mid_size+=("${trial[@]}")
    sft_size+=("${trial[@]}")
    rl_size+=(--num-steps "$NUM_STEPS" --questions-per-step 2 --num-samples 2 --max-tokens 32 --eval-questions 2)
    chat_problems+=(--max-problems "$NUM_STEPS" --max-tokens 32)
fi
tokenizer_shards=$((num_shards < 8 ? num_shards : 8)) # 2 billion characters, what tok_train reads

mkdir -p "$NANOCHAT_BASE_DIR/speedrun"

# --- report: notes the machine and the time ---
stage report_reset python -m nanochat.report reset

# --- data: a few shards for the tokenizer, the rest meanwhile; 100 MB each, minutes ---
stage "data_$tokenizer_shards" python -m nanochat.data.dataset --data "$DATASET" -n "$tokenizer_shards"
download=""
if [ "$num_shards" -gt "$tokenizer_shards" ]; then
    stage "data_$num_shards" python -m nanochat.data.dataset --data "$DATASET" -n "$num_shards" &
    download=$!
fi

# --- tokenizer: 2 billion characters, a minute ---
stage tok_train python -m scripts.tok_train --data "$DATASET" --vocab-size "$VOCAB_SIZE"
stage tok_eval python -m scripts.tok_eval --data "$DATASET"
if [ -n "$download" ]; then wait "$download"; fi

# --- pretraining: an hour for depth 20 on 8 H100 by the dry run's estimate, 2 minutes for the miniature ---
tag="d$DEPTH"
stage base_train train scripts.base_train --data "$DATASET" --depth "$DEPTH" ${size[@]+"${size[@]}"} \
    ${horizon[@]+"${horizon[@]}"} --save-every "$SAVE_EVERY" --run "${WANDB_RUN:-}" --resume \
    ${pretrain_flags[@]+"${pretrain_flags[@]}"}

# --- evaluation of the base model: bits per byte, samples, CORE; minutes ---
after=base_train stage base_loss train scripts.base_loss --model-tag "$tag" ${bpb[@]+"${bpb[@]}"}
after=base_train optional_stage base_eval train scripts.base_eval --model-tag "$tag" ${core[@]+"${core[@]}"}

# --- chat: conversations, finetuning, tasks, reinforcement learning; 15 minutes for the miniature ---
chat() {
    local common=(--model-tag "$tag" --run "${WANDB_RUN:-}" --resume)
    stage mid_train train scripts.mid_train "${common[@]}" ${mid_size[@]+"${mid_size[@]}"} || return
    stage chat_sft train scripts.chat_sft "${common[@]}" ${sft_size[@]+"${sft_size[@]}"} \
        ${NUM_STEPS:+--chat-every 0} || return
    if ! python -c 'import sys; from nanochat.evals.execution import isolation; sys.exit(isolation().method == "none")'; then
        echo "this system cannot isolate the code that HumanEval runs: it is left out"
        chat_tasks="${chat_tasks/|HumanEval/}"
    fi
    local evaluation=(--model-tag "$tag" --tasks "$chat_tasks" --resume ${chat_problems[@]+"${chat_problems[@]}"})
    after=chat_sft stage chat_eval train scripts.chat_eval -i sft "${evaluation[@]}" || return
    if [ "$RL" = 1 ]; then
        stage chat_rl train scripts.chat_rl "${common[@]}" "${rl_size[@]}" || return
        after=chat_rl stage rl_eval train scripts.chat_eval -i rl "${evaluation[@]}" || return
    fi
}

source="base"
if [ "${CHAT:-1}" = 1 ]; then
    chat || [ "$?" -eq 2 ] # without the data, the base model remains
    if [ -d "$NANOCHAT_BASE_DIR/sft_checkpoints/$tag" ]; then source="sft"; fi
    if [ "$RL" = 1 ] && [ -d "$NANOCHAT_BASE_DIR/rl_checkpoints/$tag" ]; then source="rl"; fi
fi

python -m nanochat.report generate
echo "chat with it: source .venv/bin/activate; python -m scripts.chat_web --source $source --model-tag $tag"
