#!/usr/bin/env bash
# torch 2.13.0 on a CPU: the eps of F.normalize and F.cosine_similarity does not exist in fp16.
#
# The default eps (1e-12, 1e-8) is rounded to fp16 before use and becomes 0, so that a zero vector gives NaN where fp32
# and bf16 give 0. The norm is rounded to fp16 too: a vector longer than 65504 is divided by inf and becomes zeros, with
# no NaN to notice. Autocast changes neither. torch.compile computes the same line in fp32 and returns the expected
# result, so eager and compiled code disagree.
#
# Seen: eager zero [nan] long [0.0] cosine [nan]; compiled zero [0.0] long [0.0442].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
from torch.nn import functional as F

zero = torch.zeros(1, 8, dtype=torch.float16)
long = torch.full((1, 512), 4000.0, dtype=torch.float16)  # norm 90510
compiled = torch.compile(F.normalize)

for dtype in (torch.float32, torch.bfloat16):
    assert F.normalize(zero.to(dtype))[0, 0] == 0
    assert abs(F.normalize(long.to(dtype))[0, 0].item() - 512**-0.5) < 1e-3
    assert F.cosine_similarity(zero.to(dtype), zero.to(dtype) + 1)[0] == 0

eager = F.normalize(zero)[0, 0].item(), F.normalize(long)[0, 0].item(), F.cosine_similarity(zero, zero + 1)[0].item()
with torch.autocast("cpu", dtype=torch.float16):
    cast = F.normalize(zero)[0, 0].item(), F.normalize(long)[0, 0].item()
fused = compiled(zero)[0, 0].item(), compiled(long)[0, 0].item()
print(f"torch {torch.__version__}: eager zero [{eager[0]}] long [{eager[1]}] cosine [{eager[2]}]; "
      f"autocast zero [{cast[0]}] long [{cast[1]}]; compiled zero [{fused[0]}] long [{fused[1]:.4f}]")
assert math.isnan(eager[0]) and eager[1] == 0 and math.isnan(eager[2])
assert math.isnan(cast[0]) and cast[1] == 0
assert fused[0] == 0 and abs(fused[1] - 512**-0.5) < 1e-3
PYTHON
