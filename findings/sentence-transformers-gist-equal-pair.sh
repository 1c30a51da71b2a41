#!/usr/bin/env bash
# sentence-transformers 6.2.0: GISTEmbedLoss takes a text that is paired with itself for its own negative.
#
# The loss drops candidates that the guide finds nearer to the anchor than the positive is. Nothing else keeps an anchor
# from being its own candidate among the anchors, nor a positive among the positives: the guide's similarity of a row
# and itself is 1, more than that of the pair. But where a pair is one text twice, as SimCSE trains, the guide gives the
# pair 1 as well, and 1 is not more than 1. Each row then has itself as a negative twice, at similarity 1: a solved batch
# costs log 3, and one whose views are 0.9 alike, as dropout makes them, log(1 + 2 exp(0.1 / temperature)), which the
# rows themselves fill. A margin of 0.01 is enough to drop them.
#
# Seen, temperature 0.01, solved batch: unequal texts 0.0000; equal texts 1.0986; contrast_anchors=False 0.6931; also
# contrast_positives=False 0.0000; margin=0.01 0.0000. Views 0.9 alike: unequal texts 0.0000; equal texts 10.6932.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy sentence-transformers==6.2.0 transformers==5.24.0
cat > "$folder/pairs.py" <<'PYTHON'
import importlib.metadata
import math

import torch
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
from transformers import CLIPTokenizer

TOKENIZER = CLIPTokenizer()  # the loss compares those of model and guide, and reads no more of them
ROWS, REST = torch.eye(16).chunk(2)


class Tower(torch.nn.Module):  # in place of a SentenceTransformer: the vectors of both texts of the pairs, in turn
    max_seq_length = 8

    def __init__(self, *columns):
        super().__init__()
        self.tokenizer = TOKENIZER
        self.columns = iter(columns)

    def forward(self, features):
        return features | {"sentence_embedding": next(self.columns)}


def view(alike):
    return alike * ROWS + math.sqrt(1 - alike**2) * REST


def loss(guide, model=1.0, **options):
    ids = torch.arange(8)[:, None]
    features = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for _ in range(2)]
    return float(GISTEmbedLoss(Tower(ROWS, view(model)), Tower(ROWS, view(guide)), **options)(features, None))


seen = {
    "unequal texts": loss(0.8),
    "equal texts": loss(1.0),
    "contrast_anchors=False": loss(1.0, contrast_anchors=False),
    "also contrast_positives=False": loss(1.0, contrast_anchors=False, contrast_positives=False),
    "margin=0.01": loss(1.0, margin=0.01),
    "views 0.9 alike, unequal texts": loss(0.8, 0.9),
    "views 0.9 alike, equal texts": loss(1.0, 0.9),
}
print("sentence-transformers", importlib.metadata.version("sentence-transformers"))
print("; ".join(f"{name} {value:.4f}" for name, value in seen.items()))
expected = [0, math.log(3), math.log(2), 0, 0, 0, math.log(1 + 2 * math.exp(0.1 / 0.01))]
assert all(abs(value - right) < 1e-3 for value, right in zip(seen.values(), expected, strict=True))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/pairs.py"
