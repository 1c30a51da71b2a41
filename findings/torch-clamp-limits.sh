#!/usr/bin/env bash
# The derivative of clamp on its limits went from 1 to 0 in torch 2.14, and to 1/2 where the limits are tensors.
#
# Up to 2.13 clamp, clip, clamp_min and clamp_max passed gradients on to values that stand on a limit, unlike hardtanh and
# relu6, which are the same functions. Since 2.14 they do as these do. With two tensors as limits the gradient is now shared
# between the value and the limit, as by minimum and maximum. Values on a limit are no rare case: black and white pixels of
# a picture, a temperature that was clamped to its largest value, a probability of exactly 0. An optimiser that clamps its
# parameter in the forward pass cannot leave the limit any more: projected gradient descent on pixels through
# (pixels + noise).clamp(0, 1) gives no noise to black pixels.
#
# Seen with torch 2.13.0 and 2.14.1 (pytorch/pytorch issue 195931).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/limits.py" <<'PYTHON'
import torch
import torch.nn.functional as F

FUNCTIONS = {
    "clamp(0, 1)": lambda x: x.clamp(0, 1),
    "clamp_min(0)": lambda x: x.clamp_min(0),
    "clamp with tensors": lambda x: x.clamp(torch.zeros(()), torch.ones(())),
    "hardtanh(0, 1)": lambda x: F.hardtanh(x, 0, 1),
    "minimum and maximum": lambda x: torch.minimum(torch.maximum(x, torch.zeros(())), torch.ones(())),
}
print("torch", torch.__version__.partition("+")[0])
for name, function in FUNCTIONS.items():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    function(x).sum().backward()
    print(f"  {name:<20}", *(f"{g:g}" for g in x.grad.tolist()))

noise = torch.zeros(3, requires_grad=True)
for _ in range(10):
    loss = -((torch.tensor([0.0, 0.5, 1.0]) + noise).clamp(0, 1) * torch.tensor([1.0, 1.0, -1.0])).sum()
    (gradient,) = torch.autograd.grad(loss, noise)
    noise = (noise.detach() - 0.01 * gradient.sign()).requires_grad_()
print("  noise after ten steps on black, grey and white:", *(f"{n:.2f}" for n in noise.tolist()))
PYTHON
for version in 2.13.0 2.14.1; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "torch==$version" 2> "$folder/warned"
  "$folder/$version/bin/python" "$folder/limits.py" 2> "$folder/warned"
done | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
torch 2.13.0
  clamp(0, 1)          0 1 1 1 0
  clamp_min(0)         0 1 1 1 1
  clamp with tensors   0 1 1 1 0
  hardtanh(0, 1)       0 0 1 0 0
  minimum and maximum  0 0.5 1 0.5 0
  noise after ten steps on black, grey and white: 0.10 0.10 -0.10
torch 2.14.1
  clamp(0, 1)          0 0 1 0 0
  clamp_min(0)         0 0 1 1 1
  clamp with tensors   0 0.5 1 0.5 0
  hardtanh(0, 1)       0 0 1 0 0
  minimum and maximum  0 0.5 1 0.5 0
  noise after ten steps on black, grey and white: 0.00 0.10 0.00
EXPECTED
