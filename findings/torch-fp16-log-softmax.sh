#!/usr/bin/env bash
# torch 2.13.0 on a CPU: log_softmax, cross_entropy and logsumexp of fp16 keep their sum of exponentials in fp16.
#
# After subtraction of the maximum, N equal entries sum to N, and fp16 ends at 65504. So a row of 65536 equal logits (a
# queue of 65536 keys before the first step) has the loss inf, although the result, 11.09, is well within range. The
# gradient stays finite and is wrong: the other entries get 0 instead of p. softmax of the same row is right, and so is
# log_softmax along any dimension but the last. torch.compile computes it in fp32 and is right. Autocast runs
# cross_entropy in fp32 on a CPU, but leaves log_softmax and logsumexp as they are.
#
# Seen: cross_entropy [inf], log_softmax dim 1 [-inf], dim 0 [-11.09], logsumexp [inf], compiled [11.09], fp32 [11.09],
# gradient of a negative [0.0].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
from torch.nn import functional as F

keys = 65_536
row = torch.zeros(1, keys, dtype=torch.float16, requires_grad=True)
target = torch.zeros(1, dtype=torch.long)
loss = F.cross_entropy(row, target)
loss.backward()
plain = row.detach()
last, first = torch.log_softmax(plain, 1)[0, 0].item(), torch.log_softmax(plain.T.contiguous(), 0)[0, 0].item()
lse = torch.logsumexp(plain, 1).item()
compiled = torch.compile(F.cross_entropy)(plain, target).item()
exact = F.cross_entropy(plain.float(), target).item()
negative = row.grad[0, 1].item()
print(f"torch {torch.__version__}: cross_entropy [{loss.item()}], log_softmax dim 1 [{last}], dim 0 [{first:.2f}], "
      f"logsumexp [{lse}], compiled [{compiled:.2f}], fp32 [{exact:.2f}], gradient of a negative [{negative}]")
assert loss.item() == lse == -last == math.inf
assert all(abs(right - math.log(keys)) < 0.02 for right in (-first, compiled, exact))
assert negative == 0 and torch.softmax(plain, 1)[0, 1] > 0
with torch.autocast("cpu", dtype=torch.float16):
    assert abs(F.cross_entropy(plain, target).item() - exact) < 0.02
    assert torch.log_softmax(plain, 1)[0, 0] == -math.inf and torch.logsumexp(plain, 1) == math.inf
PYTHON
