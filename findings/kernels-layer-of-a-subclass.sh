#!/usr/bin/env bash
# kernels puts a layer into a subclass whose forward takes other arguments, if the class above was kernelized before.
#
# replace_kernel_forward_from_hub(Base, "Doubled") marks the classes that inherit from Base too. kernelize compares the
# arguments of a layer's forward with those of the module and raises a TypeError where they differ, so a subclass with a
# forward of its own is refused. But a layer that passed once, for any class, is remembered by its repository and not
# compared again: after kernelize(Base()) the same subclass gets the forward of Base's layer without a word, and what its
# own forward computed is lost. Which of the two happens depends on the order alone.
#
# Seen with kernels 0.17.2 and torch 2.13.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check kernels==0.17.2
variant="$folder/doubled/build/torch-cpu"
mkdir -p "$variant"
echo '{"name": "doubled", "id": "_doubled_cpu_1", "version": 1, "license": "MIT", "python-depends": [], "backend": {"type": "cpu"}}' \
  > "$variant/metadata.json"
echo "from . import layers" > "$variant/__init__.py"
cat > "$variant/layers.py" <<'PYTHON'
from torch import nn


class Doubled(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return 2 * x
PYTHON
cat > "$folder/order.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from torch import nn


class Base(nn.Module):
    def forward(self, x):
        return 2 * x


class Sum(Base):
    def forward(self, x, y, weight):
        return x + weight * y


replace_kernel_forward_from_hub(Base, "Doubled")
layer = LocalLayerRepository(repo_path=Path(sys.argv[1]), layer_name="Doubled")
with use_kernel_mapping({"Doubled": {"cpu": layer}}, inherit_mapping=False):
    if sys.argv[2] == "after":
        kernelize(Base(), mode=Mode.TRAINING, device="cpu")
    try:
        module = kernelize(Sum(), mode=Mode.TRAINING, device="cpu")
    except TypeError:
        print("the subclass first: TypeError")
    else:
        print("the subclass after its base: forward takes", *module.forward.__code__.co_varnames, "and gives", module(torch.tensor(3.0)).item())
PYTHON
for order in first after; do
  HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/order.py" "$folder/doubled" "$order" 2> "$folder/warned"
done | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
the subclass first: TypeError
the subclass after its base: forward takes self x and gives 6.0
EXPECTED
