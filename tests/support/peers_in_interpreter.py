"""Under TRITON_INTERPRET=1: the peers' losses and gradients on the CPU against eager ones. test_peers.py runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import triton.language as tl

from benchmarks.gate import relative_errors
from benchmarks.ops import clip_loss, options, other_losses, peers
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


class NoStream(nullcontext[None]):
    """A stream and an event of a machine without a GPU: everything is in order anyway."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def siglip(**setting: Any) -> dict[str, float]:
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # it asks at import
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.stream = torch.cuda.current_stream = lambda *_, **__: NoStream()
    import siglip_kernel.fused_chunked_epilogue as epilogue

    if not isinstance(epilogue._gemm_bce_kernel, Untuned):
        epilogue._gemm_bce_kernel = Untuned(epilogue._gemm_bce_kernel)
    inputs = other_losses.make_sigmoid({"B": 96, "D": 32}, torch.float32, CPU)
    return errors(inputs, other_losses.eager_sigmoid, partial(peers.siglip_kernel_loss, **setting))


class Untuned:
    """A kernel with the smallest tiles that its buffers are made for, instead of the best that it finds on a GPU."""

    def __init__(self, tuned: Any) -> None:
        self.kernel = tuned.fn

    def __getitem__(self, grid: Any) -> Any:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8}
        return lambda *args: self.kernel[grid(tile)](*args, **tile)


def memeff() -> dict[str, float]:
    from memeff import clip_loss as module

    module._validate_features = lambda *_: None  # that they are CUDA tensors
    module._FORCE_FA = True  # or it asks the GPU which of its kernels to take
    inputs = clip_loss.make({"B": 128, "D": 64}, torch.float32, CPU)
    right = clip_loss.expect_without_scale(inputs, {"B": 128})
    banks = {name: inputs[name] for name in ("x", "y")}
    return relative_errors(step(partial(peers.memeff_loss, scale=clip_loss.SCALE), banks), right, inputs)


def memeff_prefixes() -> dict[str, float]:
    from memeff import mrl_clip_loss, mrl_qwen3_loss

    mrl_clip_loss._validate_features = lambda *_: None
    mrl_qwen3_loss._FORCE_BACKWARD = "prefix"
    mrl_clip_loss._backward_blocks = lambda *_: (32, 32, 4, 1)
    inputs = options.make({"B": 96, "D": 128}, torch.float32, CPU)
    prefixes = (64, 128)  # of its two chunks of features
    options.prefixes_of = lambda x: prefixes
    right = options.expect_prefixes_without_scale(inputs, {"B": 96})
    banks = {name: inputs[name] for name in ("x", "y")}
    loss = partial(peers.memeff_prefixes_loss, scale=options.SCALE, prefixes=prefixes)
    return relative_errors(step(loss, banks), right, inputs)


def errors(inputs: Tensors, eager: Loss, peer: Loss) -> dict[str, float]:
    return relative_errors(step(peer, inputs), fp64_step(inputs, {}, loss=eager), inputs)


if __name__ == "__main__":
    checks: dict[str, dict[str, Callable[[], dict[str, float]]]] = {
        peers.INF_CL: {"": inf_cl},
        # What it picks itself for bf16, the dtype that is timed, and its other settings, with two chunks.
        peers.SIGLIP_KERNEL: {
            "": partial(siglip, variant="chunked_bf16"),
            **{
                name: partial(siglip, **{**setting, **({"chunk": 64} if "chunk" in setting else {})})
                for name, setting in other_losses.SIGLIP_KERNEL_SETTINGS.items()
            },
        },
        peers.MEMEFF: {"": memeff, "prefixes": memeff_prefixes},
    }
    found = {
        f"{package} {name}".strip(): check()
        for package, settings in checks.items()
        if peers.version(package)
        for name, check in settings.items()
    }
    print(json.dumps(found))
