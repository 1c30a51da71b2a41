"""pgd_step_ by one call of the compiled module, see csrc/cpu/pgd_step.cpp and csrc/cuda/pgd_step.cu."""

from __future__ import annotations

import torch

from ccu_fast import _C
from ccu_fast.ops.native import DTYPES, address, on, on_gpu
from ccu_fast.ops.pgd_step.api import BadGradient, NoiseStep

STREAMS = 64  # of a device that are told apart
_refusals: dict[torch.device, Refusals] = {}


class Refusals:
    """Errors that the steps on a device have found, which the host reads without waiting for them.

    Each stream has a number that its steps set, and read before they write anything, and the same in pinned memory.
    Of more streams than STREAMS some share one: then a step may be refused for what another stream's met.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.refused = torch.zeros(STREAMS, dtype=torch.int64, device=device)
        self.told = torch.zeros(STREAMS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.seen = self.told.numpy()
        self.places: dict[int, int] = {}
        self.wait()  # any stream may be the next to read it

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def raise_first(self) -> None:
        """Raise the first error and forget it, so that steps are taken again."""
        self.wait()
        what = next((int(number) for number in self.seen if number), 0)
        if not what:
            return
        self.refused.zero_()
        self.seen[:] = 0
        self.wait()
        where = f"in an earlier step on {self.device}, since when none was made on its stream"
        if what < 0:
            raise ValueError(
                f"step, eps, lower, upper: expected finite numbers, step and eps >= 0, lower <= upper, got others for "
                f"channel {-what - 1} {where}"
            )
        raise ValueError(
            f"grad: expected no NaN (for l2: finite values), got another at its element {what - 1}, counted through, "
            f"{where} (nan_policy='zero' makes no step where it is)"
        )


def _refusals_of(device: torch.device) -> tuple[Refusals, bool]:
    """The refusals of a device, and whether the host may read them: not while a CUDA graph is captured."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _refusals.get(device)
    if found is None:
        if capturing:
            raise RuntimeError(
                f"pgd_step_: expected a step on {device} before a CUDA graph captures one with nan_policy='raise', "
                "got none yet"
            )
        found = _refusals[device] = Refusals(device)
    return found, not capturing


def raise_refused(device: torch.device | None) -> None:
    """Wait for the steps of a device (None: of all) and raise for the first that was refused."""
    for known, refusals in list(_refusals.items()):
        if device is None or device == known:
            refusals.raise_first()


def step(p: NoiseStep) -> None:
    """Write the step to ``p.delta``. What a check finds on a GPU is raised by a later step."""
    device = p.delta.device
    # Without channels the samples are told apart by the l2 norm alone.
    samples, channels = p.delta.shape[0], 1 if p.channel is None else p.channel.shape[1]
    inner = p.delta.numel() // max(samples * channels, 1)
    if p.channel is None and not p.l2:
        samples, inner = 1, p.delta.numel()
    parts = None
    if on_gpu(device) and p.l2:
        parts = torch.empty(2, samples, _C.PGD_SLICES, dtype=torch.float64, device=device)
    size, eps, lower, upper = p.numbers
    guard, where = on(device)
    with guard:
        refused = told = 0
        if p.check and on_gpu(device):
            refusals, may_look = _refusals_of(device)
            place = refusals.places.setdefault(where["stream"], len(refusals.places) % STREAMS)
            if may_look and refusals.seen[place]:
                refusals.raise_first()
            refused, told = (t.data_ptr() + 8 * place for t in (refusals.refused, refusals.told))
        found = _C.pgd_step(
            delta=p.delta.data_ptr(),
            grad=p.grad.data_ptr(),
            image=p.image.data_ptr(),
            out=address(p.out),
            dtype=DTYPES[p.delta.dtype],
            grad_dtype=DTYPES[p.grad.dtype],
            samples=samples,
            channels=channels,
            inner=inner,
            step=size,
            eps=eps,
            lower=lower,
            upper=upper,
            channel=address(p.channel),
            l2=p.l2,
            check=p.check,
            parts=address(parts),
            refused=refused,
            told=told,
            **where,
        )
    if found:
        raise BadGradient
