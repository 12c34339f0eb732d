#!/usr/bin/env bash
# safetensors 0.8.0: save(tensors) needs twice the tensors' memory on top of
# them, save_file(tensors, path) nothing.
#
# Behaviour: save returns the file's content as bytes. While it makes them a
# second copy of all tensors exists, so that the peak is three times the
# tensors, and once more of them stays until the bytes are written. save_file
# writes the same content from where the tensors lie.
#
# Why one would not guess it: both are documented side by side as the same
# serialisation to a buffer and to a file, and a buffer costs one copy. Whoever
# takes save so as to write the bytes in a way of their own (to a temporary
# file that is renamed, to an object store) needs 15 GB for a model of 5.
#
# Seen with Python 3.11, numpy 2.2.6, 500 MB of float32, growth of the peak:
#   save       2.0 times the tensors
#   save_file  0.0 times
#   the two contents are equal
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.2.6
cd "$work"
cat > measure.py <<'EOF'
import resource
import sys

import numpy as np
from safetensors.numpy import save, save_file

tensors = {f"layer.{i}": np.full(25_000_000, i, np.float32) for i in range(5)}
whole = sum(x.nbytes for x in tensors.values())


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


before = peak()
content = save(tensors) if sys.argv[1] == "save" else save_file(tensors, "to-file.safetensors")
print((peak() - before) / whole)
if content is not None:
    with open("saved.safetensors", "wb") as file:
        file.write(content)
EOF
buffer=$("$work/venv/bin/python" measure.py save)
file=$("$work/venv/bin/python" measure.py save_file)
echo "save $buffer times the tensors, save_file $file times"
cmp saved.safetensors to-file.safetensors
"$work/venv/bin/python" - "$buffer" "$file" <<'EOF'
import sys

buffer, file = map(float, sys.argv[1:])
if not (1.8 < buffer < 2.2 and file < 0.1):
    sys.exit("the behaviour has changed")
EOF
