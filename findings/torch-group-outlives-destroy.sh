#!/usr/bin/env bash
# torch 2.13.0 on a CPU: after one step of an optimizer, destroy_process_group no longer ends gloo's threads.
#
# An optimizer's first step imports torch._dynamo, and that torch.distributed.nn.functional. The functions there have
# group=group.WORLD as a default argument, and Python evaluates a default when it defines the function: imported after
# init_process_group, they hold the group itself. destroy_process_group then drops torch's own references alone, the
# group is never destructed, and its threads live until Python ends. Imported before, the default is None and the
# threads end with destroy_process_group. That training scripts destroy their group, as the warning asks, does not help:
# nearly all of them make the group before the first step.
#
# Seen: imported before: 0 threads left, default None; by the first step: 3 threads left, default ProcessGroup.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/step.py" <<'PYTHON'
import gc
import importlib
import os
import sys

import torch
import torch.distributed as dist

early, store = sys.argv[1] == "early", sys.argv[2]


def threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            names.append(open(f"/proc/self/task/{task}/comm").read().strip())
        except OSError:  # it has ended meanwhile
            pass
    return [name for name in names if "gloo" in name]


if early:
    importlib.import_module("torch.distributed.nn.functional")
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
torch.optim.SGD([weight], lr=0.1).step()
dist.all_reduce(weight.grad)
assert threads()
dist.destroy_process_group()
gc.collect()
(default,) = importlib.import_module("torch.distributed.nn.functional").broadcast.__defaults__
print(f"torch {torch.__version__}, {sys.argv[1]}: {len(threads())} threads left, default {type(default).__name__}")
assert bool(threads()) != early and (default is None) == early
PYTHON
for when in early late; do
  OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/step.py" "$when" "$folder/store-$when"
done
