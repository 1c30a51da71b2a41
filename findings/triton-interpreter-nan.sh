#!/usr/bin/env bash
# Triton's interpreter: whether a maximum propagates NaN differs between releases and has changed twice.
#
# The default of tl.maximum and tl.max is propagate_nan=NONE: a GPU's maximum takes the number. TRITON_INTERPRET=1 took
# NaN everywhere in 3.4.0; in 3.7.1 tl.max drops it but tl.maximum and tl.max(return_indices=True) keep it; in 3.9.0 all
# three drop it. So a NaN that reaches a kernel's result in the interpreter may be lost on a GPU, and a test that passes
# with the Triton of one torch may fail with that of another. Code that depends on NaN must ask for
# propagate_nan=tl.PropagateNan.ALL.
#
# Seen for v = [nan, -1, 2, 3], as tl.maximum(v, 0)[0], tl.max(v), tl.max(v, return_indices=True)[0]:
# 3.4.0 nan nan nan, 3.7.1 nan 3.0 nan, 3.9.0 0.0 3.0 3.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 "numpy<2.5"
cat > "$folder/kernel.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def maxima(x, out):
    v = tl.load(x + tl.arange(0, 4))
    most, _ = tl.max(v, 0, return_indices=True)
    tl.store(out + tl.arange(0, 4), tl.maximum(v, 0.0))
    tl.store(out + 4, tl.max(v, 0))
    tl.store(out + 5, most)


out = torch.zeros(6)
maxima[(1,)](torch.tensor([float("nan"), -1.0, 2.0, 3.0]), out)
print(triton.__version__, *out[[0, 4, 5]].tolist())
PYTHON
for version in 3.4.0 3.7.1 3.9.0; do
  pip --no-deps --target "$folder/$version" "triton==$version"
  TRITON_INTERPRET=1 PYTHONPATH="$folder/$version" "$folder/venv/bin/python" -W ignore "$folder/kernel.py"
done | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
3.4.0 nan nan nan
3.7.1 nan 3.0 nan
3.9.0 0.0 3.0 3.0
EXPECTED
