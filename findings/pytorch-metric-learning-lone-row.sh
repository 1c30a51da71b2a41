#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0: in CrossBatchMemory, a batch of one row has its own copy as a positive.
#
# CrossBatchMemory puts a batch into the memory first and then leaves out the pairs of a row and its own copy. With one
# row it does not: not_self_comparisons in utils/loss_and_miner_utils.py takes the positions of the batch to wrap around
# the end of the memory where the last is not after the first, and the first and last position of one row are the same.
# One would have guessed that the number of rows in a batch does not matter: two rows, each with a label that nothing
# else has, have no positive and the loss 0, one such row has the loss of a perfect positive among the negatives. So a
# last batch of one row, or a loop over single rows, trains a row away from everything in the memory on the strength of
# a positive that is the row itself: drop such batches.
#
# Seen, similarity 1 to the own copy and 0.5 to three others, temperature 1: one row: loss 1.0366, positive pairs (0,
# 3), gradient 0.1863; two rows: loss 0.0000, positive pairs none, gradient 0.0000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy pytorch-metric-learning==2.9.0
"$folder/venv/bin/python" - <<'PYTHON'
import math

import pytorch_metric_learning
import torch
from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss


def seen(count):
    inner = NTXentLoss(temperature=1.0)
    memory = CrossBatchMemory(inner, embedding_size=4, memory_size=8)
    memory(torch.eye(4)[:3], torch.arange(3))  # positions 0, 1 and 2 of the memory
    pairs = []
    inner.register_forward_pre_hook(lambda _, given: pairs.extend(zip(given[2][0].tolist(), given[2][1].tolist())))
    rows = torch.full((count, 4), 0.5, requires_grad=True)
    loss = memory(rows, torch.arange(3, 3 + count))
    loss.backward()
    return loss.item(), pairs, rows.grad.norm().item()


print(f"pytorch-metric-learning {pytorch_metric_learning.__version__}")
one, two = seen(1), seen(2)
for name, (loss, pairs, norm) in (("one row", one), ("two rows", two)):
    print(f"{name}: loss {loss:.4f}, positive pairs {', '.join(map(str, pairs)) or 'none'}, gradient {norm:.4f}")
assert abs(one[0] - math.log(1 + 3 * math.exp(-0.5))) < 1e-4 and one[1] == [(0, 3)] and one[2] > 0.1
assert two == (0, [], 0)
PYTHON
