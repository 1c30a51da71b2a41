"""CCU's losses (a) and (b) with a bank of keys: what one unlearning step computes beside its towers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gate import relative_errors
from benchmarks.ops.common import build, build_compiled, leaf, our_backend, step, unit
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors
from ccu_fast.unlearn.objective import KeyBank, forgetting_loss, retention_loss

SCALE, CLASSES = 5.0, 100


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Live visual u and other rows z near their frozen selves; B of each set, K keys around class centres."""
    rng = torch.Generator().manual_seed(0)
    b, k, d = shape["B"], shape["K"], shape["D"]
    centres = unit(CLASSES, d, generator=rng)
    labels = torch.cat([torch.zeros(b, dtype=torch.long), torch.randint(1, CLASSES, (b,), generator=rng)])
    key_labels = torch.randint(CLASSES, (k,), generator=rng)

    def near(of: Tensor, noise: float = 0.7) -> Tensor:
        return F.normalize(of + noise * unit(*of.shape, generator=rng), dim=-1)

    visual, other = near(centres[labels]), near(centres[labels])
    fixed = {"r": visual[b:], "u0": visual[:b], "z0": other, "keys": near(centres[key_labels])}
    return {
        "u": leaf(near(visual[:b], 0.3), dtype, device),
        "z": leaf(near(other, 0.3), dtype, device),
        **{name: value.to(device, dtype) for name, value in fixed.items()},
        "labels": labels.to(device),
        "key_labels": key_labels.to(device),
    }


def eager(
    u: Tensor, z: Tensor, r: Tensor, u0: Tensor, z0: Tensor, keys: Tensor, labels: Tensor, key_labels: Tensor
) -> Tensor:
    """The formulas of the docstrings in plain torch."""
    n = len(u)
    all_keys = torch.cat([r, z0[n:], z0[:n], u0, keys])
    columns = torch.cat([labels[n:], labels[n:], labels[:n], labels[:n], key_labels])
    s = SCALE * u @ all_keys.T
    other = s.masked_fill(labels[:n, None] == columns, -torch.inf)
    forget = (s.logsumexp(1) - other.logsumexp(1)).mean()
    target = (SCALE * z0 @ keys.T).softmax(1)
    return forget + F.cross_entropy(SCALE * z @ keys.T, target)


def ours(
    u: Tensor,
    z: Tensor,
    r: Tensor,
    u0: Tensor,
    z0: Tensor,
    keys: Tensor,
    labels: Tensor,
    key_labels: Tensor,
    *,
    backend: str,
) -> Tensor:
    """The same by ccu_fast."""
    n = len(u)
    bank = KeyBank(keys, key_labels, key_labels)
    forget = forgetting_loss(
        u,
        r,
        u0=u0,
        a0=z0[:n],
        b0=z0[n:],
        scale=SCALE,
        bank=bank,
        backend=backend,
        forget_labels=labels[:n],
        retain_labels=labels[n:],
    )
    return forget + retention_loss(z, z0, keys, scale=SCALE, backend=backend)


def _build_ours(inputs: Tensors, shape: Shape) -> Call:
    backend = our_backend("reduce_similarity", inputs["u"])
    return build(inputs, shape, loss=partial(ours, backend=backend))


def build_ceiling(inputs: Tensors, shape: Shape) -> Call:
    """The GEMMs alone: scores of u, z and the frozen z0 against the keys, gradients of u and z."""
    keys = inputs["keys"]
    u, z, z0 = (inputs[name].detach() for name in ("u", "z", "z0"))
    scores = torch.empty(len(z), len(keys), dtype=keys.dtype, device=keys.device)
    grad = torch.empty_like(z)

    def call() -> Tensors:
        for rows, differentiated in ((u, True), (z, True), (z0, False)):
            s = torch.mm(rows, keys.T, out=scores[: len(rows)])
            if differentiated:
                torch.mm(s, keys, out=grad[: len(rows)])
        return {}

    return call


def _expect(inputs: Tensors, shape: Shape) -> Expected:
    exact = {
        k: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for k, t in inputs.items()
    }
    return Expected(step(eager, exact))


def _work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Scores and row gradients of B and, live, 2B rows, the scores of the 2B frozen ones; keys read once."""
    b, k, d = shape["B"], shape["K"], shape["D"]
    return 2 * (2 * b + 2 * 2 * b + 2 * b) * k * d, k * d * dtype.itemsize


CCU_OBJECTIVE = Op(
    name="ccu_objective",
    kernel="reduce_similarity",
    title="CCU's (a) + (b), B items of each set against a bank of K keys: loss, dU, dZ",
    make=make,
    expect=_expect,
    errors=relative_errors,
    providers=(
        Provider("eager", partial(build, loss=eager)),
        Provider("eager_compiled", partial(build_compiled, loss=eager), compiled=True),
        Provider("ccu_fast", _build_ours, role="ours"),
        Provider("gemm_ceiling", build_ceiling, role="ceiling"),
    ),
    shapes={
        "cpu": [{"B": 128, "K": 65536, "D": d} for d in (64, 512)],
        "cuda": [{"B": 128, "K": 65536, "D": 512}],
    },
    quick=[{"B": 16, "K": 500, "D": 32}],
    work=_work,
    baseline="eager",
)
