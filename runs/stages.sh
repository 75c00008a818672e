#!/usr/bin/env bash
# How speedrun.sh, which sources this file, runs its stages: each under a header and once, or not if it has no data.
# It sets `num_stages`, `notes` (the folder that says what has ended), NPROC, and `about NAME`: how long a stage takes.
# shellcheck disable=SC2154
number=0 where="the start" download="" skipped=""
dim="" plain=""
if [ -t 1 ]; then dim=$'\e[2m' plain=$'\e[0m'; fi

# Whether a stage, `NAME COMMAND...`, was finished with this command, and, where the variable `after` names another,
# that one was not run again since: what is evaluated has to be the model that it left.
is_finished() {
    local stamp="$notes/$1.done" before="$notes/${after:-}.done"
    shift
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$*" ] && ! [ "$before" -nt "$stamp" ]
}

note_finished() {
    local stamp="$notes/$1.done"
    shift
    echo "$*" >"$stamp"
}

# Runs a stage, `stage NAME TITLE COMMAND...`, unless it is finished. `train SCRIPT...` is a stage script on all GPUs,
# or in one process.
stage() {
    local name="$1" title="$2" how_long command
    shift 2
    number=$((number + 1)) where="stage $number of $num_stages, $title"
    if is_finished "$name" "$@"; then
        echo "== $number of $num_stages · $title · finished before"
        return
    fi
    command=("$@")
    if [ "$1" = train ] && [ "$NPROC" -gt 1 ]; then
        command=(torchrun --standalone --nproc_per_node="$NPROC" -m "$2" -- "${@:3}")
    elif [ "$1" = train ]; then
        command=(python -m "${@:2}")
    fi
    how_long="$(about "$name")"
    echo
    echo "== $number of $num_stages · $title${how_long:+ · about $how_long}"
    echo "$dim   $(printf ' %q' "${command[@]}")$plain"
    "${command[@]}" || return
    if ! was_skipped "$name"; then note_finished "$name" "$@"; fi
}

# A stage that the run can do without: if its data cannot be had, it is skipped, and tried again at the next start.
optional_stage() {
    rm -f "$notes/$1.skipped"
    NANOCHAT_SKIP_NOTE="$notes/$1.skipped" stage "$@" || return
    if was_skipped "$1"; then note_skipped "$1" "$2" "$(cat "$notes/$1.skipped")"; fi
}

was_skipped() { [ -e "$notes/$1.skipped" ]; }

# Says that something, `NAME TITLE WHY`, is skipped: here, at the end of the run and in the report, which evaluations
# tell themselves.
note_skipped() {
    echo "skipped: $3"
    skipped+="${skipped:+; }$2 (${3%%;*})"
    if [[ $1 != *_eval ]]; then
        python -c 'import sys; from nanochat.records import append_record
append_record(sys.argv[1], settings={}, results={"not_run": sys.argv[2]})' "$1" "$3"
    fi
}

# Has the end of the run, whatever its cause, leave nothing running and say where it stopped.
watch_exit() {
    echo $$ >"$notes/pid"
    trap at_exit EXIT
}

at_exit() {
    local status=$?
    if [ -n "$download" ]; then kill "$download" 2>/dev/null || true; fi
    rm -f "$notes/pid"
    if [ "$status" -ne 0 ]; then
        echo "stopped at $where, with status $status; the same command goes on from there, and with NANOCHAT_BASE_DIR" \
            "set to another folder, a new run begins" >&2
    fi
}
