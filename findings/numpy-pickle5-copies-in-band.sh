#!/usr/bin/env bash
# Guess: pickle protocol 5 with a buffer_callback moves every contiguous numpy array out of band, so
#   that shared memory (or a process pool on top of it) takes the data without a copy.
# What happens: it depends on class and dtype, silently. Out of band: plain ndarrays of numbers, bool,
#   long double, bytes, str, void, records, big-endian, C or Fortran order. In band, all bytes copied
#   into the pickle, no callback, no warning:
#     np.memmap (np.asarray(memmap), the same memory as a base class, goes out of band), np.matrix,
#     np.recarray, masked arrays; datetime64 and timedelta64, also as one field of a record;
#     bfloat16, float8 and other dtypes of ml_dtypes; strided views.
#   So the array that is mapped from a file already, and bfloat16 weights, are the ones that are copied;
#   .view("i8") or .view("u2") before pickling avoids it.
# Versions: numpy 2.4.6, ml_dtypes 0.6.0, Python 3.11.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
cd "$tmp"
venv/bin/python - <<'EOF'
import pickle, sys

import ml_dtypes
import numpy as np

N = 100_000
mapped = np.memmap("mapped", "f8", "w+", shape=(N,))
times = np.zeros(N, "M8[s]")
weights = np.zeros(N, ml_dtypes.bfloat16)
out_of_band = {
    "float64": np.zeros(N),
    "Fortran order": np.zeros((100, 1000), order="F"),
    "big-endian": np.zeros(N, ">f8"),
    "bool": np.zeros(N, "?"),
    "long double": np.zeros(N, np.longdouble),
    "str": np.zeros(N, "U8"),
    "void": np.zeros(N, "V8"),
    "record": np.zeros(N, [("a", "i4"), ("b", "f4")]),
    "asarray(memmap)": np.asarray(mapped),
    "datetime64 as i8": times.view("i8"),
    "bfloat16 as u2": weights.view("u2"),
}
in_band = {
    "memmap": mapped,
    "matrix": np.matrix(np.zeros(N)),
    "recarray": np.rec.array(np.zeros(N, [("a", "i4")])),
    "masked": np.ma.zeros(N),
    "datetime64": times,
    "timedelta64": np.zeros(N, "m8[ns]"),
    "record with a time": np.zeros(N, [("a", "M8[s]"), ("b", "f4")]),
    "bfloat16": weights,
    "float8": np.zeros(N, ml_dtypes.float8_e4m3fn),
    "strided": np.zeros(2 * N)[::2],
}


def moved(array):
    """Whether the data left the pickle."""
    buffers = []
    stream = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
    assert bool(buffers) == (len(stream) < array.nbytes)
    print(f"{array.nbytes} bytes: {len(buffers)} buffers, pickle of {len(stream)} bytes", end="  ")
    return bool(buffers)


changed = []
for expected, arrays in ((True, out_of_band), (False, in_band)):
    for name, array in arrays.items():
        if moved(array) != expected:
            changed.append(name)
        print(name)
sys.exit(f"the behavior has changed: {changed}" if changed else 0)
EOF
