#!/usr/bin/env bash
# Triton's interpreter up to 3.6.0 with NumPy from 2.4 on: a loop whose bound is a kernel argument raises.
#
# TRITON_INTERPRET=1 holds a scalar as a one-element array and converts it with int(). NumPy 1.25 deprecated that for
# arrays with dimensions, and NumPy 2.4 raises a TypeError, which Triton wraps. Triton 3.7 reads the element instead.
# Triton does not require NumPy, so nothing excludes the combination: torch 2.8 to 2.11 come with Triton 3.4 to 3.6, and
# pip adds the newest NumPy. Kernels compiled for a GPU are not affected. With those Tritons the interpreter needs
# "numpy<2.4".
#
# Seen for a kernel that sums five numbers: Triton 3.4.0 and 3.6.0 give 10.0 with NumPy 2.3.5 and InterpreterError with
# 2.4.6; Triton 3.7.1 gives 10.0 with both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.3.5
cat > "$folder/kernel.py" <<'PYTHON'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(x, out, n):
    value = 0.0
    for i in range(0, n):
        value += tl.load(x + i)
    tl.store(out, value)


out = torch.zeros(1)
try:
    total[(1,)](torch.arange(5.0), out, 5)
    seen = out.item()
except Exception as error:
    seen = type(error).__name__
print(triton.__version__, numpy.__version__, seen)
PYTHON
for numpy in 2.3.5 2.4.6; do
  pip "numpy==$numpy"
  for version in 3.4.0 3.6.0 3.7.1; do
    [ -d "$folder/$version" ] || pip --no-deps --target "$folder/$version" "triton==$version"
    TRITON_INTERPRET=1 PYTHONPATH="$folder/$version" "$folder/venv/bin/python" -W ignore "$folder/kernel.py"
  done
done | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
3.4.0 2.3.5 10.0
3.6.0 2.3.5 10.0
3.7.1 2.3.5 10.0
3.4.0 2.4.6 InterpreterError
3.6.0 2.4.6 InterpreterError
3.7.1 2.4.6 10.0
EXPECTED
