#!/usr/bin/env bash
# Everything that must pass before a change lands: formatting, lints and tests of the Python and the Rust code.
# About 15 minutes on 2 cores, after the first set-up. Stops at the first failure. Arguments go to pytest, for example
#   bash runs/test.sh -k report
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/setup.sh
ensure_rust

check() {
    echo
    echo "== $*"
    "$@"
}

check ruff check
check ruff format --check

# The crate's tests link libpython, which a Python that uv fetched keeps in a folder of its own.
PYO3_PYTHON="$PYTHON"
LD_LIBRARY_PATH="$(python -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))'):${LD_LIBRARY_PATH:-}"
export PYO3_PYTHON LD_LIBRARY_PATH
cd "$ROOT/rustbpe"
check cargo fmt --check
check cargo clippy --locked --all-targets -- -D warnings
check cargo test --locked
cd "$ROOT"

check python -m pytest "$@"
