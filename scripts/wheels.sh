#!/bin/sh
# Builds wheels for other machines and older C libraries: zig (PyPI's ziglang) links, rustup has the standard libraries.
#   wheels.sh DIRECTORY TARGET...    one abi3 wheel per target, as x86_64-unknown-linux-gnu
# PYTHON is a Python with maturin and ziglang. On Linux with glibc 2.17 or later, musl 1.2 or later, they need nothing else.
set -eu
out=$1
shift
for target in "$@"; do
    case $target in
        *-linux-gnu) policy=manylinux2014 ;;
        *-linux-musl) policy=musllinux_1_2 ;;
        *) echo "wheels.sh: $target: no policy for its wheels" >&2; exit 2 ;;
    esac
    rustup target list --installed | grep -qx "$target" || rustup target add "$target"
    # Cross builds of abi3 wheels need no Python of the target; that of this machine would be asked for its version.
    env -u PYO3_PYTHON "$PYTHON" -m maturin build --release --locked --quiet --zig --target "$target" \
        --compatibility "$policy" --out "$out"
done
