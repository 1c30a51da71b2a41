#!/usr/bin/env bash
# memeff 0.3.1: with margin=0 its Qwen3 InfoNCE drops positives as if they were false negatives, and turns negative.
#
# MemoryEfficientQwen3Loss leaves out negatives that are more similar than the row's own positive plus a margin. margin=0
# reads as "drop only what is more similar than the positive", and an InfoNCE loss cannot be below 0, since the positive
# is one of the terms that it is compared with. But the mask compares the product of the tile with the positive's sum of
# products, taken elsewhere and rounded another way, and it does not spare the diagonal: many rows lose their own positive
# from the denominator. Any margin above the rounding hides it: here 1e-6, more where products are TF32, as they are on a
# GPU by default. Whoever writes such a mask should take both from one product, or spare the pair by its place.
#
# Seen for 128 pairs that are almost equal (temperature 0.05): loss -3.41 at margin 0, 2.3e-05 at 1e-6 and at the default
# 0.1, where float64 says 2.4e-05 for all three. The kernels run in Triton's interpreter, in fp32; the check that the
# features lie on a GPU is taken out for that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 "numpy<2.5"
pip --no-deps triton==3.7.1 memeff==0.3.1
cat > "$folder/margins.py" <<'PYTHON'
import memeff.clip_qwen3_loss
import torch
import torch.nn.functional as F

memeff.clip_qwen3_loss._validate_features = lambda *features: None
torch.manual_seed(0)
queries = F.normalize(torch.randn(128, 64), dim=1)
documents = F.normalize(queries + 0.05 * torch.randn(128, 64), dim=1)
for margin in (0.0, 1e-6, 0.1):
    loss = memeff.MemoryEfficientQwen3Loss(temperature=0.05, margin=margin, normalized_inputs=True)
    s = queries.double() @ documents.double().T
    positive = s.diagonal()[:, None]
    dropped = (s > positive + margin) & ~torch.eye(128, dtype=torch.bool)
    exact = ((s / 0.05).masked_fill(dropped, -torch.inf).logsumexp(1) - positive[:, 0] / 0.05).mean()
    value = loss(queries, documents).item()
    print(margin, "below zero" if value < -1 else "right" if abs(value - exact) < 1e-5 else value, int(dropped.sum()))
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/margins.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
0.0 below zero 0
1e-06 right 0
0.1 right 0
EXPECTED
