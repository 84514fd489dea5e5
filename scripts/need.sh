#!/bin/sh
# Checks for the programs that a build needs, before it starts.
#   need.sh build    Python, Rust, a linker; exits 1 and prints what is missing and how to install it
#   need.sh test     also rustfmt and clippy; installs dtc, valgrind and makedumpfile if possible
#   need.sh python   prints the Python to use
set -u
cd "$(dirname "$0")/.." || exit 1

missing=0
lack() {
    missing=1
    printf 'missing: %s\n    %s\n' "$1" "$2" >&2
}

python_min=$(sed -n 's/^requires-python *= *">=\(.*\)"/\1/p' pyproject.toml)
rust_min=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' Cargo.toml)

# Prints the first Python that is new enough.
find_python() {
    for python in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        "$python" -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$python_min'.split('.'))))" 2>/dev/null &&
            echo "$python" && return
    done
    return 1
}

# at_least A B: whether version A is B or later.
at_least() {
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

build() {
    if ! python=$(find_python); then
        lack "Python $python_min or later (python3 is $(python3 --version 2>/dev/null || echo 'not there'))" \
            "Debian, Ubuntu: apt-get install python3 python3-venv; elsewhere: https://www.python.org/downloads/"
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        lack "Python's venv module (for $python)" "Debian, Ubuntu: apt-get install python3-venv"
    fi
    if ! command -v cargo >/dev/null; then
        lack "Rust $rust_min or later (no cargo on PATH)" \
            "https://rustup.rs, or apt-get install rustup && rustup default stable"
    else
        rust=$(cargo --version | cut -d' ' -f2)
        at_least "${rust%%-*}" "$rust_min" || lack "Rust $rust_min or later (cargo is $rust)" \
            "rustup update stable; without rustup: https://rustup.rs (distributions' cargo is often too old)"
    fi
    command -v cc >/dev/null || lack "a linker (no cc on PATH), which Rust uses" "Debian, Ubuntu: apt-get install gcc libc6-dev"
    command -v make >/dev/null || lack "make" "Debian, Ubuntu: apt-get install make"
}

lint_tools() {
    command -v cargo >/dev/null || return
    cargo fmt --version >/dev/null 2>&1 || lack "rustfmt" "rustup component add rustfmt"
    cargo clippy --version >/dev/null 2>&1 || lack "clippy" "rustup component add clippy"
}

# get COMMAND PACKAGE WHY: installs an optional program, or prints a note.
get() {
    command -v "$1" >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $2, $3"
        apt-get install -qq -y "$2" >/dev/null 2>&1 ||
            { apt-get update -qq && apt-get install -qq -y "$2" >/dev/null; } && return
    fi
    echo "note: $1 is not installed, $3: skipped; Debian, Ubuntu: apt-get install $2" >&2
}

case "${1:-build}" in
build) build ;;
test)
    build
    lint_tools
    if [ $missing = 0 ]; then
        get dtc device-tree-compiler "which some tests compare with"
        get valgrind valgrind "which counts the instructions of hot paths"
        get makedumpfile makedumpfile "which filters dumps for some tests"
    fi
    ;;
python) find_python || exit 1 ;;
*)
    echo "usage: need.sh build|test|python" >&2
    exit 2
    ;;
esac
exit $missing
