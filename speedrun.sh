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
#   NUM_STEPS          steps of every training stage, to try it out, by default in ~/.cache/nanochat-trial
#   TOKEN_RATIO        training tokens per parameter of matrices and head (default on GPUs: 12)
#   BASE_STEPS         steps of pretraining, without a GPU only (default: 170); every stage says how long its steps take
#   PRETRAIN_FLAGS     further flags of scripts.base_train, which win over those here
#   SAVE_EVERY         steps between checkpoints
#   CHAT               0 stops after the base model (default: 1, mid-training, finetuning and chat evaluation follow)
#   CHAT_DATA          "mixture" of data sets from the hub (default with a GPU), or "small_world", generated
#   RL                 1 adds reinforcement learning: on GSM8K, or without a GPU, where it is the default, on spelling
#   WANDB_RUN          name of the run on wandb (default: no wandb)
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi # started as `sh speedrun.sh`
set -euo pipefail

started_in="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")"

refuse() {
    echo "error: $*" >&2
    exit 2
}

# --- what is asked for, checked before the minutes of set-up ---
dry_run=0
for argument in "$@"; do
    case "$argument" in
    --dry-run) dry_run=1 ;;
    -h | --help)
        sed -n '2,/^[^#]/ s/^# \{0,1\}//p' speedrun.sh
        exit
        ;;
    *) refuse "unknown argument $argument: there are --dry-run and --help, the rest is set by variables, as in" \
        "DEPTH=20 bash ${RECIPE:-speedrun.sh}" ;;
    esac
done

# Refuses a variable with another value than it may have: `check PATTERN WORDS NAME...`.
check() {
    local pattern="^($1)$" words="$2" name
    shift 2
    for name in "$@"; do
        [[ -z ${!name:-} || ${!name} =~ $pattern ]] || refuse "$name=${!name} must be $words"
    done
}
check '[1-9][0-9]*' "a whole number above 0" DEPTH NPROC VOCAB_SIZE NUM_STEPS BASE_STEPS
check '[0-9]+' "a whole number" SAVE_EVERY
check '[0-9]*[.]?[0-9]+' "a number" TOKEN_RATIO
check '0|1' "0 or 1" CHAT RL
check 'mixture|small_world' "mixture or small_world" CHAT_DATA

default_base="$(cd ~ && pwd)/.cache/nanochat"
NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$default_base${NUM_STEPS:+-trial}}" # its checkpoints fit no other run's steps
if [[ $NANOCHAT_BASE_DIR != /* ]]; then NANOCHAT_BASE_DIR="$started_in/$NANOCHAT_BASE_DIR"; fi
export NANOCHAT_BASE_DIR PYTHONUNBUFFERED=1
notes="$NANOCHAT_BASE_DIR/speedrun" # of the stages that have ended or were skipped

without_gpu="" # why this cannot be trained without a GPU
if [ "$dry_run" = 0 ]; then
    if [ -n "${RECIPE:-}" ]; then
        without_gpu="error: $RECIPE needs GPUs, and this machine has none: --dry-run says what it takes"
    elif [ "${DEPTH:-0}" -gt 12 ]; then
        without_gpu="error: DEPTH=$DEPTH needs GPUs, and this machine has none: leave it out for a miniature of depth 4"
        without_gpu+=" (12 is the most it takes); --dry-run says what it takes"
    fi
    if ! mkdir -p "$notes" 2>/dev/null || ! [ -w "$notes" ]; then
        refuse "cannot write to the work folder $NANOCHAT_BASE_DIR: set NANOCHAT_BASE_DIR to another one"
    fi
    # In a container that was killed and started again, this process has the number of that of before.
    if other="$(cat "$notes/pid" 2>/dev/null)" && [ "$other" != $$ ] && kill -0 "$other" 2>/dev/null; then
        refuse "speedrun.sh is at work in $NANOCHAT_BASE_DIR already: process $other (if that is another, delete" \
            "$notes/pid)"
    fi
fi

source runs/setup.sh

if [ "$dry_run" = 0 ] && [ -n "${WANDB_RUN:-}" ]; then # hours before the first stage that needs it
    python -c 'import sys, wandb
try:
    wandb.login()
except wandb.errors.Error as error:
    sys.exit(f"error: WANDB_RUN: {error} Set WANDB_MODE=offline, or leave WANDB_RUN out.")' || exit 2
fi

# --- sizes ---
num_gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
read -ra pretrain_flags <<<"${PRETRAIN_FLAGS:-}"
horizon=()
times=plan base_time="" mid_time="" total_time="" # of stages, in words
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
    if [ "$num_gpus" -gt 0 ] && [ "$NPROC" -gt "$num_gpus" ] && [ "$dry_run" = 0 ]; then
        refuse "NPROC=$NPROC is more than the $num_gpus GPUs of this machine"
    fi
    for DEPTH in ${DEPTH:-24 20 16 12 8}; do
        plan="$(python -m scripts.base_train --dry-run --depth "$DEPTH" --vocab-size "$VOCAB_SIZE" --num-gpus "$NPROC" \
            ${GPU:+--gpu "$GPU"} --save-every "$SAVE_EVERY" ${horizon[@]+"${horizon[@]}"} \
            ${pretrain_flags[@]+"${pretrain_flags[@]}"})"
        { read -r num_shards; read -r fits; read -r base_time; read -r mid_time; read -r total_time; } < <(
            tail -n 1 <<<"$plan" | python -c 'import json, sys; plan = json.load(sys.stdin)
print(plan["num_shards"], plan.get("fits"), sep="\n")
for key in ("hours", "mid_hours", "total_hours"):
    hours = plan.get(key)
    print("" if hours is None else f"{60 * hours:.0f} minutes" if hours < 1.5 else f"{hours:.1f} hours")'
        )
        if [ "$fits" != False ]; then break; fi
    done
    echo "${plan%$'\n'*}"
    if [ "$dry_run" = 1 ]; then exit; fi
elif [ -n "$without_gpu" ]; then # there is one that torch does not use
    echo "$without_gpu" >&2
    exit 2
else
    if [ -z "${NUM_STEPS:-}${BASE_STEPS:-}${TOKEN_RATIO:-}${DEPTH:-}${DATASET:-}${PRETRAIN_FLAGS:-}" ]; then
        times=miniature total_time="14 minutes"
    fi
    NPROC="${NPROC:-1}"
    DATASET="${DATASET:-local}"
    DEPTH="${DEPTH:-4}"
    VOCAB_SIZE="${VOCAB_SIZE:-1024}" # words of few letters to a token, whose letters can be learned
    size=(--sequence-len 256 --head-dim 64 --window-pattern L --eval-every 100)
    SAVE_EVERY="${SAVE_EVERY:-100}"
    # Steps and not minutes, so that a busy machine takes longer and trains the same model.
    if [ -z "${TOKEN_RATIO:-}" ]; then
        horizon=(--num-steps "${NUM_STEPS:-${BASE_STEPS:-170}}" --total-batch-size 4096)
    fi
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
if [ "$NPROC" -gt 1 ]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi # as torchrun sets it, with a warning
if [ -n "${NUM_STEPS:-}" ]; then # these win over those before
    mid_time="" total_time=""
    trial=(--num-steps "$NUM_STEPS" --max-conversations 200 --eval-tokens 4096)
    mid_size+=("${trial[@]}")
    sft_size+=("${trial[@]}")
    rl_size+=(--num-steps "$NUM_STEPS" --questions-per-step 2 --num-samples 2 --max-tokens 32 --eval-questions 2)
    chat_problems+=(--max-problems "$NUM_STEPS" --max-tokens 32)
fi
tokenizer_shards=$((num_shards < 8 ? num_shards : 8)) # 2 billion characters, what tok_train reads

# How long a stage takes, where that is known: as measured on two cores for the miniature, as planned for GPUs.
about() {
    case "$times/$1" in
    plan/base_train) echo "$base_time" ;;
    plan/mid_train) echo "$mid_time" ;;
    miniature/data_*) echo "20 seconds" ;;
    miniature/tok_*) echo "10 seconds" ;;
    miniature/base_train | miniature/chat_sft | miniature/chat_rl) echo "2 minutes" ;;
    miniature/mid_train) echo "6 minutes" ;;
    miniature/*) echo "half a minute" ;;
    esac
}
num_stages=6
if [ "${CHAT:-1}" = 1 ]; then num_stages=$((RL == 1 ? 11 : 9)); fi

source runs/stages.sh
watch_exit
echo "$num_stages stages${total_time:+, about $total_time in all}, in $NANOCHAT_BASE_DIR"
echo "Ctrl-C stops at any time, and the same command goes on from there."

# --- report: notes the machine and the time; one for each depth ---
if ! is_finished "report_reset_d$DEPTH" python -m nanochat.report reset; then
    python -m nanochat.report reset
    note_finished "report_reset_d$DEPTH" python -m nanochat.report reset
fi

# --- data: a few shards for the tokenizer, the rest meanwhile; 100 MB each, minutes ---
stage "data_$tokenizer_shards" "text" python -m nanochat.data.dataset --data "$DATASET" -n "$tokenizer_shards"
all_shards=(python -m nanochat.data.dataset --data "$DATASET" -n "$num_shards")
if [ "$num_shards" -gt "$tokenizer_shards" ] && ! is_finished "data_$num_shards" "${all_shards[@]}"; then
    echo "meanwhile, the next stages run: $((num_shards - tokenizer_shards)) more shards of 100 MB are fetched"
    "${all_shards[@]}" &
    download=$!
fi

# --- tokenizer: 2 billion characters, a minute ---
stage tok_train "tokenizer" python -m scripts.tok_train --data "$DATASET" --vocab-size "$VOCAB_SIZE"
stage tok_eval "evaluation of the tokenizer" python -m scripts.tok_eval --data "$DATASET"
if [ -n "$download" ]; then
    where="the rest of the text"
    wait "$download"
    download=""
    note_finished "data_$num_shards" "${all_shards[@]}"
fi

# --- pretraining: an hour for depth 20 on 8 H100 by the dry run's estimate, 2 minutes for the miniature ---
tag="d$DEPTH"
stage base_train "pretraining" train scripts.base_train --data "$DATASET" --depth "$DEPTH" ${size[@]+"${size[@]}"} \
    ${horizon[@]+"${horizon[@]}"} --save-every "$SAVE_EVERY" --run "${WANDB_RUN:-}" --resume \
    ${pretrain_flags[@]+"${pretrain_flags[@]}"}

# --- evaluation of the base model: bits per byte, samples, CORE; minutes ---
after=base_train stage base_loss "bits per byte" train scripts.base_loss --model-tag "$tag" ${bpb[@]+"${bpb[@]}"}
after=base_train optional_stage base_eval "CORE" train scripts.base_eval --model-tag "$tag" ${core[@]+"${core[@]}"}

# --- chat: conversations, finetuning, tasks, reinforcement learning; 15 minutes for the miniature ---
chat() {
    local common=(--model-tag "$tag" --run "${WANDB_RUN:-}" --resume) why
    optional_stage mid_train "mid-training" train scripts.mid_train "${common[@]}" ${mid_size[@]+"${mid_size[@]}"}
    if was_skipped mid_train; then
        skipped+=" and all stages after it"
        return
    fi
    optional_stage chat_sft "finetuning" train scripts.chat_sft "${common[@]}" ${sft_size[@]+"${sft_size[@]}"} \
        ${NUM_STEPS:+--chat-every 0}
    if was_skipped chat_sft; then
        skipped+=" and all stages after it"
        return
    fi
    if [[ $chat_tasks == *HumanEval* ]]; then
        why="$(python -c 'from nanochat.evals.execution import isolation
print(isolation().reason if isolation().method == "none" else "")')"
        if [ -n "$why" ]; then
            note_skipped HumanEval HumanEval "HumanEval: no isolation here for code that a model writes; $why"
            chat_tasks="${chat_tasks/|HumanEval/}"
        fi
    fi
    local evaluation=(--model-tag "$tag" --tasks "$chat_tasks" --resume ${chat_problems[@]+"${chat_problems[@]}"})
    after=chat_sft optional_stage chat_eval "chat evaluation" train scripts.chat_eval -i sft "${evaluation[@]}"
    if [ "$RL" = 1 ]; then
        optional_stage chat_rl "reinforcement learning" train scripts.chat_rl "${common[@]}" "${rl_size[@]}"
        if was_skipped chat_rl; then return; fi
        after=chat_rl optional_stage rl_eval "chat evaluation after RL" train scripts.chat_eval -i rl "${evaluation[@]}"
    fi
}
if [ "${CHAT:-1}" = 1 ]; then chat; fi

# --- what came out ---
where="the report"
echo
echo "== results"
python -m nanochat.report generate
python -m nanochat.report summary
if [ -n "$skipped" ]; then echo "skipped, and tried again at the next start: $skipped"; fi
environment="${VIRTUAL_ENV:-.venv}" folder="" base=""
if [ "$started_in" != "$PWD" ]; then folder="cd $(printf %q "$PWD") && "; fi
if [ "$NANOCHAT_BASE_DIR" != "$default_base" ]; then base="NANOCHAT_BASE_DIR=$(printf %q "$NANOCHAT_BASE_DIR") "; fi
echo "chat with it in the browser, or with chat_cli instead of chat_web in this terminal:"
echo "    ${folder}source $(printf %q "${environment#"$PWD/"}")/bin/activate"
echo "    ${base}python -m scripts.chat_web"
