"""candidate_losses: the batch's loss with one caption replaced, for every caption and candidate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gate import relative_errors, spread_rows
from benchmarks.ops.common import our_backend, unit
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors

SCALE = 50.0
CHECKED_ROWS = 16


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Unit features; captions near their images, candidates near their captions."""
    rng = torch.Generator().manual_seed(0)
    image = unit(shape["B"], shape["D"], generator=rng)
    text = torch.nn.functional.normalize(image + unit(shape["B"], shape["D"], generator=rng), dim=-1)
    candidates = text[:, None] + 0.3 * unit(shape["B"], shape["K"], shape["D"], generator=rng)
    candidates = torch.nn.functional.normalize(candidates, dim=-1)
    return {k: t.to(device, dtype) for k, t in (("candidates", candidates), ("image", image), ("text", text))}


def loss(image: Tensor, text: Tensor) -> Tensor:
    """Symmetric InfoNCE by its formula."""
    logits = SCALE * image @ text.T
    target = torch.arange(len(image), device=image.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def loop(candidates: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """One full loss for each row and candidate."""
    rows = []
    for b in range(candidates.shape[0]):
        changed = text.clone()
        for k in range(candidates.shape[1]):
            changed[b] = candidates[b, k]
            rows.append(loss(image, changed))
    return torch.stack(rows).view(candidates.shape[:2])


def batched(candidates: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """All candidates of a row in one batch of losses."""
    rows = []
    k, target = candidates.shape[1], torch.arange(len(image), device=image.device)
    for b in range(candidates.shape[0]):
        changed = text.repeat(k, 1, 1)
        changed[:, b] = candidates[b]
        logits = SCALE * (image @ changed.mT)
        own = logits.diagonal(dim1=1, dim2=2)
        rows.append(((logits.logsumexp(2) + logits.logsumexp(1)) / 2 - own)[:, target].mean(1))
    return torch.stack(rows)


def expect(inputs: Tensors, shape: Shape) -> Expected:
    """The loop in fp64, on some rows."""
    candidates, image, text = (t.double() for t in inputs.values())
    rows = spread_rows(shape["B"], CHECKED_ROWS, image.device)
    wanted = range(shape["B"]) if rows is None else rows.tolist()
    losses = []
    for b in wanted:
        for k in range(shape["K"]):
            changed = text.clone()
            changed[b] = candidates[b, k]
            losses.append(loss(image, changed))
    values = torch.stack(losses).view(-1, shape["K"])
    said = "fp64" if rows is None else f"fp64; {CHECKED_ROWS} of {shape['B']} rows"
    return Expected({"losses": values}, {"losses": SCALE}, rows=rows, said=said)


def _call(function: Callable[..., Tensor], inputs: Tensors) -> Tensors:
    return {"losses": function(*inputs.values())}


def build(inputs: Tensors, shape: Shape, *, function: Callable[..., Tensor]) -> Call:
    """The function as it is written."""
    return partial(_call, function, inputs)


def build_ours(inputs: Tensors, shape: Shape) -> Call:
    """ccu_fast.candidate_losses."""
    from ccu_fast import candidate_losses

    backend = our_backend("candidate_losses", inputs["image"])
    return partial(_call, partial(candidate_losses, scale=SCALE, backend=backend), inputs)


def build_reference(inputs: Tensors, shape: Shape) -> Call:
    """The same factorisation in plain torch."""
    from ccu_fast import candidate_losses

    return partial(_call, partial(candidate_losses, scale=SCALE, backend="reference"), inputs)


def build_compiled(inputs: Tensors, shape: Shape) -> Call:
    """That under torch.compile."""
    from ccu_fast import candidate_losses

    function = torch.compile(partial(candidate_losses, scale=SCALE, backend="reference"), dynamic=False)
    return partial(_call, function, inputs)


def build_ceiling(inputs: Tensors, shape: Shape) -> Call:
    """The similarities of candidates and images alone."""
    candidates, image = inputs["candidates"].flatten(0, 1), inputs["image"]
    return partial(_gemm, candidates, image, image.new_empty(candidates.shape[0], image.shape[0]))


def _gemm(candidates: Tensor, image: Tensor, out: Tensor) -> Tensors:
    torch.mm(candidates, image.T, out=out)
    return {}


def work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """2·B·K·B·D FLOPs; one read of the candidates."""
    flops = 2.0 * shape["B"] ** 2 * shape["K"] * shape["D"]
    return flops, float(dtype.itemsize * shape["D"] * shape["B"] * (shape["K"] + 2))


CANDIDATE_LOSSES = Op(
    name="candidate_losses",
    kernel="candidate_losses",
    title="symmetric InfoNCE with one of B captions replaced, for K candidates of each; forward alone",
    make=make,
    expect=expect,
    errors=relative_errors,
    providers=(
        Provider("loop", partial(build, function=loop)),
        Provider("batched", partial(build, function=batched)),
        Provider("factored_torch", build_reference),
        Provider("factored_compiled", build_compiled, compiled=True),
        Provider("ccu_fast", build_ours, role="ours"),
        Provider("gemm_ceiling", build_ceiling, role="ceiling"),
    ),
    shapes={device: [{"B": 128, "K": 17, "D": 512}] for device in ("cpu", "cuda")},
    quick=[{"B": 5, "K": 3, "D": 16}],
    work=work,
    baseline="loop",
)
