#!/usr/bin/env bash
# The first optimizer of a process imports torch's compiler, whether or not anything is compiled.
#
# torch.optim.SGD([parameter], lr=0.1) as the first optimizer of a process loads torch._dynamo, sympy and hundreds of
# modules more, which takes seconds of CPU time; importing torch, a backward pass and torch.nn do not. Whoever times several
# training methods in one process charges these seconds to the one that comes first. The second optimizer costs nothing,
# and of another class too.
#
# Seen with torch 2.13.0 (CPU build): neither module is there after a backward pass, both are after the first optimizer,
# with more than 500 new modules; no module is new after the second.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/first.py" <<'PYTHON'
import sys
import time

import torch

parameter = torch.nn.Parameter(torch.ones(2))
parameter.square().sum().backward()


def loaded():
    return {name: name in sys.modules for name in ("torch._dynamo", "sympy")}


print("after a backward pass", loaded())
for make in (lambda: torch.optim.SGD([parameter], lr=0.1), lambda: torch.optim.Adam([parameter])):
    before, start = set(sys.modules), time.process_time()
    make()
    new = len(set(sys.modules) - before)
    print(f"optimizer: {'more than 500' if new > 500 else new} new modules", loaded())
    print(f"{time.process_time() - start:.2f} s of CPU time", file=sys.stderr)
PYTHON
"$folder/venv/bin/python" "$folder/first.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
after a backward pass {'torch._dynamo': False, 'sympy': False}
optimizer: more than 500 new modules {'torch._dynamo': True, 'sympy': True}
optimizer: 0 new modules {'torch._dynamo': True, 'sympy': True}
EXPECTED
