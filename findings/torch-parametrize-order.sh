#!/usr/bin/env bash
# Removing a parametrization moves a parameter to the end of its module's list, and an optimizer's state to the wrong one.
#
# torch.nn.utils.parametrize.register_parametrization and remove_parametrizations give a module back its own names, and its
# state_dict has the same entries. But the order of parameters() is another one: of a Linear layer the bias comes first.
# An optimizer's state_dict names parameters by their number in that order, so the state of Adam from before such a pair of
# calls (LoRA that is merged, a spectral norm that is taken off) loads without an error where shapes are alike, and each
# moment then belongs to another parameter.
#
# Seen with torch 2.13.0 (CPU build): a Linear layer lists weight, bias before and bias, weight after; of a module with two
# parameters whose gradients were 10 and 1, the second has the moment of 10 after Adam's state was loaded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/order.py" <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils import parametrize


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.full((2,), 1.0))
        self.second = nn.Parameter(torch.full((2,), 2.0))


class Same(nn.Module):
    def forward(self, weight):
        return weight


layer = nn.Linear(3, 2)
print([name for name, _ in layer.named_parameters()])
parametrize.register_parametrization(layer, "weight", Same())
parametrize.remove_parametrizations(layer, "weight")
print([name for name, _ in layer.named_parameters()], list(layer.state_dict()))

pair = Pair()
before = torch.optim.Adam(pair.parameters())
(10 * pair.first.sum() + pair.second.sum()).backward()
before.step()
parametrize.register_parametrization(pair, "first", Same())
parametrize.remove_parametrizations(pair, "first")
after = torch.optim.Adam(pair.parameters())
after.load_state_dict(before.state_dict())
for name, parameter in pair.named_parameters():
    print(name, "mean gradient", round(after.state[parameter]["exp_avg"][0].item() / 0.1, 3))
PYTHON
"$folder/venv/bin/python" "$folder/order.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
['weight', 'bias']
['bias', 'weight'] ['bias', 'weight']
second mean gradient 10.0
first mean gradient 1.0
EXPECTED
