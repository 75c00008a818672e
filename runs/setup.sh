#!/usr/bin/env bash
# Set-up: the locked Python packages in .venv, and the rustbpe crate built into it. speedrun.sh and runs/test.sh source
# this file; `bash runs/setup.sh` runs it alone. A second run takes a second and changes nothing.
#
# About 3 minutes and 8 GB of disk (3 GB without a GPU, where PyTorch's own package index can be reached).
# Afterwards PYTHON and VIRTUAL_ENV are set, and the commands of the environment and cargo are on PATH.
#
# May be set beforehand:
#   NANOCHAT_VENV     folder of the environment (default: .venv in this repository)
#   NANOCHAT_PYTHON   Python >= 3.11 to build it on (default: the first one found to run, else uv fetches one)
#   TORCH_INDEX       package index to take torch from, or "pypi" (default: what suits the machine)
#   MIN_FREE_GB       disk space that must be free before anything is fetched
set -euo pipefail

export HOME="${HOME:-$(cd ~ && pwd)}"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VIRTUAL_ENV="${NANOCHAT_VENV:-$ROOT/.venv}"
[[ $VIRTUAL_ENV == /* ]] || VIRTUAL_ENV="$PWD/$VIRTUAL_ENV"
PYTHON="$VIRTUAL_ENV/bin/python"
LOCK="$ROOT/requirements.lock"
PYTORCH_INDEXES="https://download.pytorch.org/whl"
TORCH_LINES='^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=='

for store in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do
    if [ -e "$store" ]; then export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"; fi # uv's own list lacks a company's
done

say() { echo "set-up: $*"; }
fail() {
    echo "set-up failed: $*" >&2
    exit 1
}

# --- running things ------------------------------------------------------------------------------

# Runs a command with its output kept in a log of its own.
quietly() {
    SETUP_LOG="${SETUP_LOG:-$(mktemp)}"
    "$@" >"$SETUP_LOG" 2>&1 </dev/null
}

# Runs a command that set-up cannot do without; where it fails, one line says what went wrong.
attempt() {
    local what="$1" cause
    shift
    quietly "$@" && return
    if grep -qiE 'no space left|os error 28' "$SETUP_LOG"; then
        cause="the disk is full"
    elif grep -qiE 'linker .+ not found' "$SETUP_LOG"; then
        cause="no working C compiler, install gcc or clang"
    elif grep -qiE 'failed to (fetch|download)|sending request|resolve host|network|connect' "$SETUP_LOG"; then
        cause="the package index is out of reach, check the network and the proxy settings"
    else
        # The first error, but for what uv says around the output of a build.
        cause="$(sed -nE '/[Bb]uild.*(rustbpe|backend)|build_wheel/d; s/^ *((error|cause)(\[[A-Z0-9]+\])?: .*)/\1/p' \
            "$SETUP_LOG" | cut -c -160)"
        cause="${cause%%$'\n'*}"
    fi
    fail "cannot $what: ${cause:-it ended with an error} (details: $SETUP_LOG)"
}

# The first of the given commands that runs; a pyenv or rustup shim may be there with nothing behind it.
first_that_runs() {
    local command
    for command in "$@"; do
        if "$command" --version >/dev/null 2>&1; then
            command -v "$command"
            return
        fi
    done
    return 1
}

fetch() {
    if command -v curl >/dev/null; then
        curl --proto '=https' -LsSf --connect-timeout 10 --max-time 60 "$1"
    else
        wget -qO- --timeout=10 --tries=1 "$1"
    fi
}
uv_installer() { fetch https://astral.sh/uv/install.sh | UV_INSTALL_DIR="$ROOT/.uv/bin" UV_NO_MODIFY_PATH=1 sh; }
rust_installer() { fetch https://sh.rustup.rs | sh -s -- -y --no-modify-path --profile minimal -c rustfmt -c clippy; }

# --- uv, Python, Rust, a C compiler ----------------------------------------------------------------

find_uv() { UV="$(first_that_runs uv "$HOME/.local/bin/uv" "${CARGO_HOME:-$HOME/.cargo}/bin/uv" "$ROOT/.uv/bin/uv")"; }

# pip first: it works wherever the packages themselves can be fetched. Into a folder of its own, as many systems
# refuse installs beside their own packages.
ensure_uv() {
    local pip_python
    find_uv && return
    say "installing uv into .uv"
    mkdir -p "$ROOT/.uv" 2>/dev/null || fail "no permission to write to $ROOT"
    echo '*' >"$ROOT/.uv/.gitignore"
    for pip_python in "${NANOCHAT_PYTHON:-python3}" python /usr/bin/python3; do
        quietly "$pip_python" -m pip install --retries 1 --target "$ROOT/.uv" --upgrade uv && find_uv && return
    done
    quietly uv_installer && find_uv && return
    fail "uv is missing, and neither pip nor its installer could fetch it; check the network, or install uv by hand"
}

find_python() {
    local candidate
    local is_fit='import sys; assert sys.version_info >= (3, 11); print(sys.executable)'
    if [ -n "${NANOCHAT_PYTHON:-}" ]; then
        "$NANOCHAT_PYTHON" -c "$is_fit" 2>/dev/null || fail "NANOCHAT_PYTHON=$NANOCHAT_PYTHON is no Python >= 3.11"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python /usr/bin/python3; do
        "$candidate" -c "$is_fit" 2>/dev/null && return
    done
    return 1
}

ensure_venv() {
    local base
    if [ -e "$VIRTUAL_ENV/.incomplete" ]; then # stopped while it was filled: a package may be there in part
        rm -f "$PYTHON"
    elif "$PYTHON" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then
        return
    fi
    if [ -e "$VIRTUAL_ENV" ] && [ ! -f "$VIRTUAL_ENV/pyvenv.cfg" ]; then
        fail "$VIRTUAL_ENV is no virtual environment; move it away, or set NANOCHAT_VENV"
    fi
    if [ -x "$PYTHON" ] && "$PYTHON" --version >/dev/null 2>&1; then
        fail "$VIRTUAL_ENV has $("$PYTHON" --version), too old; remove it, or set NANOCHAT_VENV to another folder"
    fi
    if base="$(find_python)"; then
        attempt "create the environment" "$UV" venv --clear --python "$base" "$VIRTUAL_ENV"
    else
        [ -z "${NANOCHAT_PYTHON:-}" ] || exit 1
        quietly "$UV" venv --clear --python 3.12 "$VIRTUAL_ENV" ||
            fail "no Python >= 3.11 here, and uv cannot fetch one; install it, or name it with NANOCHAT_PYTHON"
    fi
    touch "$VIRTUAL_ENV/.incomplete"
}

ensure_compiler() {
    local compiler
    compiler="$(first_that_runs cc gcc clang)" || fail "no C compiler (cc, gcc or clang): install gcc or clang"
    if ! first_that_runs cc >/dev/null; then # the linker that rustc calls by default
        export CC="$compiler" RUSTFLAGS="${RUSTFLAGS:-} -C linker=$compiler"
    fi
}

find_cargo() {
    local cargo
    cargo="$(first_that_runs cargo "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" "$HOME/.cargo/bin/cargo")" || return 1
    case ":$PATH:" in *":$(dirname "$cargo"):"*) ;; *) PATH="$(dirname "$cargo"):$PATH" ;; esac
}

ensure_rust() {
    find_cargo && return
    say "installing Rust with rustup"
    quietly rust_installer && find_cargo && return
    fail "no Rust, and its installer is out of reach; install cargo, or set CARGO_HOME and RUSTUP_HOME to where it is"
}

ensure_build_tools() {
    ensure_compiler
    ensure_rust
}

# --- torch ---------------------------------------------------------------------------------------

has_gpu() { [ -e /dev/nvidia0 ] || [ -e /dev/dxg ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# PyTorch's indexes to try for a build that suits this machine better than PyPI's, best first; none where PyPI's does.
suited_indexes() {
    local cuda capability locked_major build
    if [ "$(uname -s)" != Linux ]; then return; fi
    if ! has_gpu; then
        echo "$PYTORCH_INDEXES/cpu"
        return
    fi
    cuda="$(nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA[A-Za-z ]* Version: *([0-9]+)\.([0-9]+).*/\1\2/p')"
    capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -n | head -n 1)"
    locked_major="$(sed -nE 's/^cuda-toolkit==([0-9]+)\..*/\1/p' "$LOCK")"
    cuda="${cuda:-999}" capability="${capability:-75}" # unknown: take what PyPI has
    # A build runs on any driver of its CUDA major version or above, and CUDA 13 has no code for GPUs before Turing.
    if [ "$cuda" -ge "${locked_major:-0}0" ] && [ "$capability" -ge 75 ]; then return; fi
    for build in 129 128 126; do
        if [ "$build" = 126 ] || { [ "$cuda" -ge "$build" ] && [ "$capability" -ge 75 ]; }; then
            echo "$PYTORCH_INDEXES/cu$build"
        fi
    done
}

reachable() {
    "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
}

# Whether the environment has a torch from elsewhere that pyproject.toml allows: whoever put it there meant it.
has_own_torch() {
    "$PYTHON" - "$1" "$2" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
wanted, locked = sys.argv[1:]
sys.exit(version("torch") == locked or not Requirement(wanted).specifier.contains(version("torch")))
PYTHON
}

check_disk() {
    local folder free
    for folder in "$VIRTUAL_ENV" "$1"; do
        mkdir -p "$folder" 2>/dev/null || fail "no permission to write to $folder"
        free="$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }')"
        [ "$free" -ge "$2" ] || fail "$folder has $free GB of free disk, $2 GB are needed (MIN_FREE_GB to ask for less)"
    done
}

# --- packages and the crate ----------------------------------------------------------------------

# uv runs outside the repository: the project's `exclude-newer` is for making the lock, and an index that does not
# tell upload times would seem empty under it.
uv_install() { (cd / && "$UV" pip install --python "$PYTHON" "$@"); }

# Prints the lock without torch and the CUDA packages that belong to PyPI's build of it, hashes included.
lock_without_torch() { awk -v torch="$TORCH_LINES" '/^[A-Za-z0-9]/ { skip = ($0 ~ torch) } !skip' "$LOCK"; }

install_packages() {
    local wanted locked index source="" others
    wanted="$(sed -nE 's/^ *"(torch[><=][^"]*)".*/\1/p' "$ROOT/pyproject.toml")"
    locked="$(sed -nE 's/^torch==([0-9.]+).*/\1/p' "$LOCK")"
    others="$VIRTUAL_ENV/requirements-without-torch.txt"
    lock_without_torch >"$others"
    if [ -z "${TORCH_INDEX:-}" ] && has_own_torch "$wanted" "$locked"; then
        say "installing the locked packages (the torch in the environment is kept)"
        attempt "install the locked packages" uv_install --no-deps --require-hashes -r "$others"
        return
    fi
    for index in ${TORCH_INDEX:-$(suited_indexes)}; do
        if [ "$index" != pypi ] && reachable "$index/torch/"; then
            check_disk "$("$UV" cache dir)" "${MIN_FREE_GB:-3}"
            say "installing the locked packages, torch from $index"
            attempt "install the locked packages" uv_install --no-deps --require-hashes -r "$others"
            quietly uv_install --index-url "$index" "torch==$locked" && return
            quietly uv_install --index-url "$index" "$wanted" && return
        fi
        source="$index"
    done
    case "$source" in
        "" | pypi) ;;
        */cpu) say "PyTorch's CPU builds are out of reach: PyPI's serves, with CUDA libraries not needed here" ;;
        *) say "no torch from $source: PyPI's serves, which may need a newer NVIDIA driver than this one" ;;
    esac
    "$PYTHON" -c 'import torch' 2>/dev/null || check_disk "$("$UV" cache dir)" "${MIN_FREE_GB:-8}"
    say "installing the locked packages, torch from PyPI"
    attempt "install the locked packages" uv_install --no-deps --require-hashes -r "$LOCK"
}

build_crate() {
    ensure_build_tools
    say "building rustbpe"
    PATH="$VIRTUAL_ENV/bin:$PATH" MATURIN_PEP517_ARGS="--locked" attempt "build rustbpe" \
        uv_install --no-deps --no-build-isolation --reinstall-package rustbpe "$ROOT/rustbpe"
}

warn_of_unused_gpu() {
    if has_gpu && ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        say "warning: this torch cannot use the GPU here; update the NVIDIA driver, or name a build with TORCH_INDEX"
    fi
}

# Runs a step unless it was done with these same files: `once NAME STEP FILE...`.
once() {
    local stamp="$VIRTUAL_ENV/.$1.done" step="$2" now hash
    shift 2
    hash="$(command -v sha256sum || echo shasum)"
    now="$(cat "$@" | "$hash")"
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$now" ]; then return; fi
    if [ -z "${UV:-}" ]; then
        [ -e "$VIRTUAL_ENV/.rustbpe.done" ] || ensure_build_tools # better missed now than after a long download
        ensure_uv
        ensure_venv
    fi
    "$step"
    rm -f "$VIRTUAL_ENV/.incomplete"
    echo "$now" >"$stamp"
}

if [ -n "${without_gpu:-}" ] && ! has_gpu; then # set by speedrun.sh, for what is not to be trained on a CPU
    echo "$without_gpu" >&2
    exit 2
fi

SETUP_START=$SECONDS
once packages install_packages "$LOCK" <(echo "${TORCH_INDEX:-}")
once rustbpe build_crate "$ROOT"/rustbpe/{Cargo.toml,Cargo.lock,pyproject.toml} "$ROOT"/rustbpe/src/*.rs
find_cargo || true # only the tests need it from here on
export VIRTUAL_ENV PYTHON PATH="$VIRTUAL_ENV/bin:$PATH"
if [ -n "${UV:-}" ]; then
    warn_of_unused_gpu
    say "ready in $((SECONDS - SETUP_START)) s: $("$PYTHON" --version), in $VIRTUAL_ENV"
    rm -f "${SETUP_LOG:-}"
else
    say "up to date, in $VIRTUAL_ENV"
fi
