#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0: efficient=True on several processes drops the pair of a row and its own second view.
#
# DistributedLossWrapper(loss, efficient=True)(x, labels, ref_emb=y, ref_labels=...) removes from the positive pairs
# those of equal positions, as it must where a batch is compared with itself. It does so with ref_emb as well, where
# equal positions are two views of one item: get_indices_tuple in utils/distributed.py, which forward_regular_loss
# calls. The documentation says that efficient=True changes gradients; one would not guess that it changes which pairs
# there are, and efficient=False and a single process keep the pair. So who trains on two views takes efficient=False:
# otherwise the loss is 0 with nothing to learn where every item has its own label, and lacks the item's own view where
# labels repeat.
#
# Seen, rows whose own view is as near as one other, loss log 2: one process 0.6932; two processes, where the wrapper
# multiplies by their number: efficient=False 1.3864, gradient 5.05; efficient=True 0.0000, gradient 0.00.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy pytorch-metric-learning==2.9.0
cat > "$folder/views.py" <<'PYTHON'
import math
import sys

import pytorch_metric_learning
import torch
import torch.distributed as dist
from pytorch_metric_learning.losses import NTXentLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

ROWS = torch.eye(4)
VIEWS = (ROWS + ROWS.roll(1, 0)) / math.sqrt(2)  # of row i: similarity 0.71 to rows i and i - 1, 0 to the others
LABELS = torch.arange(4)  # cloned below: where ref_labels is the same tensor, the library leaves equal positions out


def work(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = slice(2 * rank, 2 * rank + 2)
    for efficient in (False, True):
        rows = ROWS[own].clone().requires_grad_()
        wrapped = DistributedLossWrapper(NTXentLoss(), efficient=efficient)
        loss = wrapped(rows, LABELS[own], ref_emb=VIEWS[own], ref_labels=LABELS[own].clone())
        loss.backward()
        norm = rows.grad.norm().item()
        if rank == 0:
            print(f"two processes, efficient={efficient}: loss {loss.item():.4f}, gradient {norm:.2f}", flush=True)
        if efficient:
            assert loss.item() == norm == 0
        else:
            assert abs(loss.item() - 2 * math.log(2)) < 1e-3 and norm > 1
    dist.destroy_process_group()


if __name__ == "__main__":
    alone = NTXentLoss()(ROWS, LABELS, ref_emb=VIEWS, ref_labels=LABELS.clone()).item()
    print(f"pytorch-metric-learning {pytorch_metric_learning.__version__}, one process: loss {alone:.4f}", flush=True)
    assert abs(alone - math.log(2)) < 1e-3
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/views.py" "$folder/store"
