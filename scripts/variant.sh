#!/bin/sh
# Builds the extension with other flags, and runs tests with it: scripts/variant.sh NAME RUSTFLAGS TEST...
# The package is copied to the target directory, so the release build in python/kho is not changed.
set -eu
name=$1 flags=$2
shift 2
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}
# Other flags rebuild everything. A separate directory keeps the results of ordinary builds.
if [ -n "$flags" ]; then
    target=$target/$name
fi
# cargo treats an empty RUSTFLAGS as unset.
RUSTFLAGS="${RUSTFLAGS:-} $flags" CARGO_TARGET_DIR=$target \
    cargo build --quiet --locked -p kho-python --profile "$name-extension"
package=$target/$name-python
rm -rf "$package"
mkdir -p "$package"
cp -R python/kho "$package/kho"
rm -f "$package"/kho/_kho*.so
cp "$target/$name-extension/lib_kho.so" "$package/kho/_kho.abi3.so"
PYTHONPATH=$package "$PYTHON" -c 'import kho, sys; assert kho.__file__.startswith(sys.argv[1]), kho.__file__' "$package"
PYTHONPATH=$package "$PYTHON" -m pytest -q --benchmark-skip -p no:cacheprovider "$@"
