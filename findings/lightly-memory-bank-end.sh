#!/usr/bin/env bash
# lightly 1.6.0: the memory bank cuts a batch off where the bank ends, and the rest of the batch is never stored.
#
# MoCo's own code insists that the batch divides the queue, and CrossBatchMemory of pytorch-metric-learning wraps around.
# MemoryBankModule, which holds the negatives of NTXentLoss(memory_bank_size=...) and the neighbours of NNCLR, does
# neither: it fills the bank up to its end, goes back to the first row and leaves out what remains of the batch. So the
# bank is not the last K keys. Where the batch does divide it, one short batch, such as the last of an epoch without
# drop_last, still costs the next one to reach the end its last rows. Of a batch larger than the bank only the first rows
# are ever stored, the same part each time if batches are sorted, by source for example.
#
# Seen, bank of 8, rows numbered from 0: 6 batches of 3: 9 10 11 12 13 14 15 16, without the newest, 17. Batches of 4, 3,
# 4 and 4: 11 12 13 14 4 5 6 7, without 8, 9 and 10. One batch of 20: 0 1 2 3 4 5 6 7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy
pip --no-deps lightly==1.6.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
# The module of the bank alone: lightly.models imports torchvision, and the bank reads it only to gather over ranks.
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import torch

package = Path(importlib.util.find_spec("lightly").origin).parent
sys.modules["lightly.models"] = types.ModuleType("lightly.models")
sys.modules["lightly.models"].utils = None
spec = importlib.util.spec_from_file_location("memory_bank", package / "models" / "modules" / "memory_bank.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def kept(*batches):
    bank = module.MemoryBankModule(size=(8, 1))
    for rows in torch.arange(float(sum(batches)))[:, None].split(list(batches)):
        bank(rows, update=True)
    return bank.bank[:, 0].int().tolist()


seen = {"6 batches of 3": kept(*[3] * 6), "4, 3, 4 and 4": kept(4, 3, 4, 4), "one batch of 20": kept(20)}
print("lightly", importlib.metadata.version("lightly"))
for name, rows in seen.items():
    print(f"{name}:", *rows)
assert seen["6 batches of 3"] == [9, 10, 11, 12, 13, 14, 15, 16]
assert seen["4, 3, 4 and 4"] == [11, 12, 13, 14, 4, 5, 6, 7]
assert seen["one batch of 20"] == [0, 1, 2, 3, 4, 5, 6, 7]
PYTHON
