"""pgd_step_: one projected gradient step on additive noise, in place, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops import machine
from ccu_fast.ops.backend import choose, load, outside_transforms, unavailable
from ccu_fast.ops.operator import changed, in_place, operator

_NAMES = ("step", "eps", "lower", "upper")


@dataclass(frozen=True)
class NoiseStep:
    """delta, in place, one projected step against grad.

    Attributes:
        delta: ``[B, C, ...]``, fp32, fp16, bf16 or fp64; contiguous.
        grad: its shape, floating point; contiguous.
        image: its shape and dtype; contiguous.
        numbers: step, eps, lower, upper.
        channel: the four per channel in their place, ``[4, C]`` in fp32 (fp64 for fp64 noise), or None. Step and eps
            of l2 are numbers all the same.
        out: like delta, for the noisy images; contiguous; or None.
        l2: project to the Euclidean ball of a sample instead of the box.
        check: raise, before anything is written, for NaN (l2: or inf) in grad; otherwise make no step there.
    """

    delta: Tensor
    grad: Tensor
    image: Tensor
    numbers: tuple[float, float, float, float]
    channel: Tensor | None
    out: Tensor | None
    l2: bool
    check: bool


class BadGradient(ValueError):
    """NaN (l2: or inf) in the gradient; nothing was written."""


def pgd_step_(
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    *,
    step: float | Tensor,
    eps: float | Tensor,
    lower: float | Tensor = 0.0,
    upper: float | Tensor = 1.0,
    norm: str = "linf",
    nan_policy: str = "raise",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Take one step of the noise against the gradient, projected to its ball and to valid images, in place::

        delta = clamp(delta - step * sign(grad), -eps, eps)                       # linf; sign(0) = 0
        delta = delta - step * grad / norm(grad); delta *= min(1, eps / norm(delta))   # l2, per sample; 0 / 0 = 0
        out = clamp(delta + image, lower, upper)
        delta = out - image

    The loss goes down; a negative gradient (``-grad``) makes it go up. Computed in fp32 (fp64 for fp64 noise).

    For an image within [lower, upper], |delta| <= eps and lower <= image + delta <= upper hold up to the rounding of
    one subtraction, the image's last place (2⁻²⁴ below 1 in fp32), and of fp16 and bf16 noise to its dtype. An image
    outside is brought inside even where that takes more than eps.

    Args:
        delta: ``[B, ...]`` fp32, fp16 or bf16 (fp64 on the reference backend); changed in place, also if it requires
            grad or is not contiguous (then through a copy). Its memory must not overlap itself.
        grad: gradient of the loss by the noise, shape of ``delta``, any floating dtype.
        image: shape, dtype of ``delta``: the clean images, in the units of ``lower`` and ``upper``.
        step: step length >= 0. A number, or a tensor per channel: one value along dimension 1 of ``delta``, such as
            ``[C, 1, 1]``, for images in normalised units. One element on the CPU is taken as a number.
        eps: radius >= 0, a number or per channel. For "l2" step and eps are numbers.
        lower: least valid value of image + delta, a number or per channel.
        upper: largest, not below ``lower``.
        norm: "linf", or "l2" (norms over all of a sample).
        nan_policy: "raise": read grad first and raise for NaN, for "l2" also for inf, with nothing written. "zero":
            take no step there and read nothing first; per-channel parameters on a GPU are then used unchecked.
        out: shape and dtype of ``delta``, contiguous: gets the noisy images in the same pass.
        backend: "auto", or "native" or "reference"; a named one raises if it cannot serve.

    Returns:
        ``delta``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Then nothing was written.

    On a GPU the kernels never make the host wait or copy from it, so a CUDA graph can hold the step, once one step was
    taken outside of it. With "raise" the kernel itself checks grad and per-channel parameters. A step that finds an
    error changes nothing, nor does any later step on the stream, until the ValueError is raised: by a later call that
    sees the error reported, or by :func:`check_pgd_steps`, which waits for it.

    Source: PGD (arXiv 1706.06083), section 2.1; its descending form makes error-minimising noise (arXiv 2101.04898).

    >>> delta, grad = torch.zeros(1, 3), torch.tensor([[1.0, -2.0, 0.0]])
    >>> ccu_fast.pgd_step_(delta, grad, torch.full((1, 3), 0.5), step=0.1, eps=0.25)
    tensor([[-0.1000,  0.1000,  0.0000]])
    """
    check.tensor("delta", delta)
    if delta.ndim < 1:
        raise ValueError("delta: expected shape [B, ...], got []")
    if any(size > 1 and stride == 0 for size, stride in zip(delta.shape, delta.stride(), strict=True)):
        raise ValueError("delta: expected memory that does not overlap itself, got an expanded tensor")
    for name, value in (("grad", grad), ("image", image)):
        check.tensor(name, value)
        check.same(name, value, "delta", delta, dtype=name == "image")
        check.shape(name, value, delta.shape)
    check.one_of("norm", norm, ("linf", "l2"))
    check.one_of("nan_policy", nan_policy, ("raise", "zero"))
    numbers, channels = _parameters(delta, norm, (step, eps, lower, upper))
    wide = torch.float64 in (delta.dtype, grad.dtype)
    if out is not None:
        check.tensor("out", out)
        check.same("out", out, "delta", delta)
        check.shape("out", out, delta.shape)
        if not out.is_contiguous() or out.requires_grad:
            raise ValueError("out: expected contiguous memory that does not require grad")
        if delta.numel() and out.untyped_storage().data_ptr() == delta.untyped_storage().data_ptr():
            raise ValueError("out: expected memory of its own, got that of delta")
    outside_transforms("pgd_step_", delta, grad, image, channels, out)
    name = choose(backend, "pgd_step_", delta.device, torch.float64 if wide else delta.dtype)
    rest: tuple[Any, ...] = (*numbers, channels, norm == "l2", nan_policy == "raise", name, out)
    call = torch.ops.ccu_fast.pgd_step_ if check.by_operator(delta) else _step
    call(delta.detach(), grad.detach(), image.detach(), *rest)
    changed(delta, out)
    return delta


def _parameters(delta: Tensor, norm: str, values: tuple[Any, ...]) -> tuple[list[float], Tensor | None]:
    """Four numbers, and where one of them is per channel, all four as ``[4, C]``."""
    numbers, given = [0.0] * 4, list(values)
    for i, (name, value) in enumerate(zip(_NAMES, values, strict=True)):
        if isinstance(value, Tensor) and not (norm == "l2" and i < 2):
            value = as_number(name, value, delta)
        if not isinstance(value, Tensor):
            given[i] = numbers[i] = check.number(name, value, low=0.0 if i < 2 else -torch.inf)
        elif norm == "l2" and i < 2:
            raise TypeError(f"{name}: expected a number for norm 'l2', got a tensor")
        else:
            given[i] = per_channel(name, value, delta)
    if not any(isinstance(value, Tensor) for value in given):
        _check_range(numbers[2], numbers[3])
        return numbers, None
    return numbers, by_channel(given, delta, torch.float64 if delta.dtype == torch.float64 else torch.float32)


def as_number(name: str, value: Tensor, delta: Tensor) -> float | Tensor:
    """A tensor of one element on the host, beside noise elsewhere, as a number: a copy of it would wait for a GPU."""
    check.tensor(name, value)
    if value.numel() != 1 or not value.is_cpu or delta.is_cpu or torch.compiler.is_compiling():
        return value
    return float(value.item())


def per_channel(name: str, value: Tensor, delta: Tensor) -> Tensor:
    """``[1]`` or ``[C]`` from a tensor that varies along dimension 1 of delta only."""
    check.tensor(name, value)
    if value.numel() == 1:
        return value.detach().reshape(1)
    check.same(name, value, "delta", delta, dtype=False)
    # Dimension 1 of [B, C, ...] counted from the right, as broadcasting does.
    place = value.ndim - (delta.ndim - 1)
    if delta.ndim < 2 or place < 0 or value.numel() != value.shape[place] or value.numel() != delta.shape[1]:
        after = [1] * (delta.ndim - 2)
        expected = f"a number or shape {[delta.shape[1], *after]}" if delta.ndim > 1 else "a number"
        raise ValueError(f"{name}: expected {expected}, got shape {list(value.shape)}")
    return value.detach().reshape(-1)


def by_channel(values: Sequence[float | Tensor], images: Tensor, dtype: torch.dtype) -> Tensor:
    """``[len(values), C]`` of numbers and of what :func:`per_channel` returns."""
    size = images.shape[1] if images.ndim > 1 else 1
    like = torch.empty((), dtype=dtype, device=images.device)
    rows = [
        value.to(like).expand(size) if isinstance(value, Tensor) else like.new_full((size,), value) for value in values
    ]
    return torch.stack(rows)


def _check_range(lower: float, upper: float) -> None:
    if lower > upper:
        raise ValueError(f"lower: expected at most upper ({upper}), got {lower}")


def _check_channels(channels: Tensor) -> None:
    for i, name in enumerate(_NAMES):
        for value in channels[i].tolist():
            check.number(name, value, low=0.0 if i < 2 else -torch.inf)
    for lower, upper in zip(channels[2].tolist(), channels[3].tolist(), strict=True):
        _check_range(lower, upper)


@operator(
    "pgd_step_(Tensor(a!) delta, Tensor grad, Tensor image, float step, float eps, float lower, float upper, "
    "Tensor? channels, bool l2, bool raise_nan, str backend, Tensor(b!)? out=None) -> ()",
    fake=in_place,
)
def _step(
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    step: float,
    eps: float,
    lower: float,
    upper: float,
    channels: Tensor | None,
    l2: bool,
    raise_nan: bool,
    backend: str,
    out: Tensor | None = None,
) -> None:
    # Reading values of a GPU would wait for it: there the kernel checks them. Plain torch waits in any case.
    if channels is not None and (machine.host_sees(channels.device) or (raise_nan and backend == "reference")):
        _check_channels(channels)
    if delta.numel() == 0:
        return
    with torch.no_grad():
        work = delta.detach().contiguous()
        numbers = (step, eps, lower, upper)
        problem = NoiseStep(work, grad.contiguous(), image.contiguous(), numbers, channels, out, l2, raise_nan)
        try:
            load("pgd_step_", backend).step(problem)
        except BadGradient:
            what = "finite values" if l2 else "no NaN"
            raise ValueError(
                f"grad: expected {what}, got {int((~torch.isfinite(grad)).sum() if l2 else torch.isnan(grad).sum())} "
                "others (nan_policy='zero' makes no step there)"
            ) from None
        if work.data_ptr() != delta.data_ptr():
            delta.detach().copy_(work)


def check_pgd_steps(device: torch.device | str | None = None) -> None:
    """Wait for the steps of :func:`pgd_step_` on a GPU and raise if one of them was refused.

    Call it after the last step with ``nan_policy="raise"``, whose error no later step can raise. Outside the CUDA
    kernels a step raises at once, and this does nothing.

    Args:
        device: a CUDA device; None: all that steps were taken on.

    Raises:
        ValueError: naming grad or the parameters, and the element or channel. It is raised once; ``delta`` is as the
            last good step left it, and the next step is taken again.

    >>> ccu_fast.check_pgd_steps()  # nothing was refused
    """
    where = None if device is None else torch.device(device)
    if where is not None and where.type == "cuda" and where.index is None and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
    if unavailable("native") is None:
        load("pgd_step_", "native").raise_refused(where)
