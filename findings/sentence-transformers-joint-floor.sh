#!/usr/bin/env bash
# sentence-transformers 6.2.0: with partition_mode="joint" and both directions, a perfect batch has the loss log 2.
#
# MultipleNegativesRankingLoss(directions=("query_to_doc", "doc_to_query"), partition_mode="joint") puts the similarities
# of all directions into one softmax. Both directions hold the similarity of a query and its own document, so the
# positive is in the denominator twice: loss = -log(p / (2 p + rest)) >= log 2, and the gradient of a solved pair is that
# of two equal logits, not zero. With all four directions, the combination for which the class cites GTE, it is the same.
#
# Seen: per_direction -0.000000; joint, two directions 0.693146; joint, four directions 0.693146.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy sentence-transformers==6.2.0 transformers==5.24.0
cat > "$folder/floor.py" <<'PYTHON'
import importlib.metadata
import math

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
vectors = torch.eye(8)  # queries and documents alike: every positive has similarity 1, every other pair 0
losses = {}
for name, mode, directions in (
    ("per_direction", "per_direction", ("query_to_doc", "doc_to_query")),
    ("joint, two directions", "joint", ("query_to_doc", "doc_to_query")),
    ("joint, four directions", "joint", GTE),
):
    loss = MultipleNegativesRankingLoss(
        SentenceTransformer(modules=[torch.nn.Identity()]), scale=50.0, directions=directions, partition_mode=mode
    )
    losses[name] = float(loss.compute_loss_from_embeddings([vectors, vectors], None))
version = importlib.metadata.version("sentence-transformers")
print(f"sentence-transformers {version}:", "; ".join(f"{name} {value:.6f}" for name, value in losses.items()))
assert losses["per_direction"] < 1e-6
assert abs(losses["joint, two directions"] - math.log(2)) < 1e-4
assert abs(losses["joint, four directions"] - math.log(2)) < 1e-4
PYTHON
"$folder/venv/bin/python" "$folder/floor.py" 2>&1 | grep -v Warning
