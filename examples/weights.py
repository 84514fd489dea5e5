"""Read a model's weights once: `python weights.py FILE.safetensors`, again and again (needs `pip install kho[live]`).

`python weights.py --release FILE.safetensors` releases the memory.
"""

import sys
import time

import kho

if sys.argv[1] == "--release":
    sys.exit(not kho.live.safetensors.release(sys.argv[2]))
begun = time.perf_counter()
weights = kho.live.safetensors.load(sys.argv[1])
took = time.perf_counter() - begun
nbytes = sum(tensor.nbytes for tensor in weights.values())
print("attached" if weights.inherited else "read", len(weights), "tensors,", nbytes, f"bytes, in {took * 1e3:.1f} ms")
for name in list(weights)[:3]:
    print(f"{name}: {weights.dtypes[name]}", *weights.shapes[name])
