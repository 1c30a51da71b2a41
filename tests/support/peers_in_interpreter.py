"""Under TRITON_INTERPRET=1: the peers' losses and gradients on the CPU against eager ones. test_peers.py runs it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
import triton.language as tl

from benchmarks.gate import relative_errors
from benchmarks.ops import clip_loss, other_losses, peers
from benchmarks.ops.common import Loss, fp64_step, step
from benchmarks.registry import Tensors

CPU = torch.device("cpu")


def same(asm: str, constraints: str, args: list[Any], **_: Any) -> Any:
    """inf_cl's inline assembly rounds fp32 to TF32, which the interpreter cannot: leave the operand as it is."""
    return args[0]


def inf_cl() -> dict[str, float]:
    tl.inline_asm_elementwise = same
    shape = {"B": 128, "D": 48}  # a whole number of its 64-row tiles, several heads
    return errors(clip_loss.make(shape, torch.float32, CPU), clip_loss.two_gemms, peers.inf_cl_loss)


def siglip() -> dict[str, float]:
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # it asks at import
    inputs = other_losses.make_sigmoid({"B": 96, "D": 32}, torch.float32, CPU)
    # What it picks itself for bf16, the dtype that is timed.
    return errors(inputs, other_losses.eager_sigmoid, partial(peers.siglip_kernel_loss, variant="chunked_bf16"))


def memeff() -> dict[str, float]:
    from memeff import clip_loss as module

    module._validate_features = lambda *_: None  # that they are CUDA tensors
    module._FORCE_FA = True  # or it asks the GPU which of its kernels to take
    inputs = clip_loss.make({"B": 128, "D": 64}, torch.float32, CPU)
    right = clip_loss.expect_without_scale(inputs, {"B": 128})
    banks = {name: inputs[name] for name in ("x", "y")}
    return relative_errors(step(partial(peers.memeff_loss, scale=clip_loss.SCALE), banks), right, inputs)


def errors(inputs: Tensors, eager: Loss, peer: Loss) -> dict[str, float]:
    return relative_errors(step(peer, inputs), fp64_step(inputs, {}, loss=eager), inputs)


if __name__ == "__main__":
    checks = {peers.INF_CL: inf_cl, peers.SIGLIP_KERNEL: siglip, peers.MEMEFF: memeff}
    print(json.dumps({name: check() for name, check in checks.items() if peers.version(name)}))
