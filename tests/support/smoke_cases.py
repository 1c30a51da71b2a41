"""Calls of every operation on sizes that fit no tile, each checked against float64, for smoke.py and test_smoke.py.

A check computes three times from the same inputs: by the backend, by plain torch in the same dtype, and by plain torch
in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

import ccu_fast
from ccu_fast.ops.backend import TRITON, gemm_dtype
from ccu_fast.ops.reduce_similarity import operator
from tests.support.tolerance import assert_three_way, rounding

Tensors = dict[str, Tensor]
# Brings a float64 master to the device, in the dtype that is checked, or rounded to it and back in float64.
Cast = Callable[[Tensor], Tensor]
Compute = Callable[[Cast, str], Tensors]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Units in the last place that are allowed where torch is exact by luck. TF32 rounds operands.
ULPS = {"fp32": 64.0, "tf32": 2.0**15, "fp16": 16.0, "bf16": 16.0}
# Losses are fp32 whatever the inputs. So is dscale, but from E as it was kept, in bf16 where the inputs are halves.
LOSS_OF_HALVES, DSCALE_OF_HALVES = 2.0**10, 2.0**17
TERMS = " terms"  # behind the name of an output: the size of what cancels in it


@dataclass(frozen=True)
class Check:
    """One call.

    Attributes:
        name: unique; begins with the operation.
        kernel: what the choice of backend calls the operation.
        arithmetic: a key of DTYPES.
        compute: outputs by name, from a cast and the name of a backend.
        large: without the kernels of small batches, which would serve this size.
    """

    name: str
    kernel: str
    arithmetic: str
    compute: Compute
    large: bool = False

    def run(self, device: torch.device, backend: str) -> None:
        """Raises AssertionError if anything is off."""
        dtype = DTYPES[self.arithmetic]
        with _settings(self):
            ours = self.compute(lambda t: t.to(dtype).to(device), backend)
            same = self.compute(lambda t: t.to(dtype).to(device), "reference")
        exact = self.compute(lambda t: t.to(dtype).double().to(device), "reference")
        scalars = {"loss": LOSS_OF_HALVES, "dscale": DSCALE_OF_HALVES} if dtype != torch.float32 else {}
        # A CPU that multiplies bf16 rounds the products too, as autocast does and the reference does not: a mean over
        # 16 rows or more of errors that are uniform within eps / 2 of the largest product.
        rounded = dtype == torch.bfloat16 and device.type == "cpu" and gemm_dtype(dtype) == dtype
        noise = rounding(dtype) * SCALE / 16**0.5 if rounded else 0.0
        for what in (name for name in ours if not name.endswith(TERMS)):
            terms = exact.get(what + TERMS)
            assert_three_way(
                f"{self.name} {what}",
                ours[what],
                same[what],
                exact[what].double(),
                ulps=scalars.get(what, ULPS[self.arithmetic]),
                magnitude=None if terms is None else float(terms),
                noise=noise if what == "loss" else 0.0,
            )


@contextmanager
def _settings(check: Check) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if check.arithmetic == "tf32" else "highest")
    pairs = 0 if check.large else operator.SMALL_PAIRS
    try:
        with patch.object(operator, "SMALL_PAIRS", pairs):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(_random(*shape, seed=seed), dim=-1)


# --- losses ----------------------------------------------------------------------------------------------------------

Loss = Callable[..., Tensor]
DIMS = (1, 8, 40, 130, 512)
ITEMS = (1, 17, 100, 128, 256, 300)
FEW = (17, 128, 300)
SCALE = 20.0


def _labels(items: int, device: torch.device) -> Tensor:
    return (torch.arange(items) % 7 - (torch.arange(items) == 3).long()).to(device)  # one item counts nowhere


def _bounded(x: Tensor, y: Tensor, *, kind: str, **options: object) -> Tensor:
    return ccu_fast.inverse_info_nce(x, y, kind=kind, row_labels=_labels(x.shape[-2], x.device), **options)


def _sup_con(x: Tensor, y: Tensor, **options: object) -> Tensor:
    return ccu_fast.sup_con(x, y, row_labels=_labels(x.shape[-2], x.device), **options)


def _with_ids(x: Tensor, y: Tensor, **options: object) -> Tensor:
    ids = torch.arange(x.shape[-2], device=x.device) // 2
    return ccu_fast.info_nce(x, y, row_ids=ids, **options)


def _everything(x: Tensor, y: Tensor, **options: object) -> Tensor:
    """Every kind of reduction on both sides in one call."""
    sides = {
        "rows": [("softplus", ccu_fast.OTHER), ("sum", ccu_fast.SELF), ("lse", ccu_fast.ALL)],
        "cols": [("lse", ccu_fast.SELF | ccu_fast.OTHER), ("softplus", ccu_fast.ALL), ("logsigmoid", ccu_fast.SELF)],
    }
    rows, cols = ccu_fast.reduce_similarity(x, y, **sides, **options)
    return torch.stack([part.mean() for part in (*rows, *cols)]).sum()


def _distilled(x: Tensor, y: Tensor, **options: object) -> Tensor:
    return ccu_fast.distill(x, y, teacher=(x[..., :5], y[..., :5]), teacher_scale=9.0, **options)


LOSSES: dict[str, Loss] = {
    "info_nce": ccu_fast.info_nce,
    "sigmoid_loss": partial(ccu_fast.sigmoid_loss, bias=-10.0),
    "bounded": partial(_bounded, kind="bounded"),
    "contrastive": partial(_bounded, kind="contrastive"),
    "sup_con": _sup_con,
    "info_nce ids": _with_ids,
    "distill": _distilled,
    "reduce_similarity": _everything,
}


def _loss(cast: Cast, backend: str, *, loss: Loss, shape: tuple[int, ...], workspace: int | None) -> Tensors:
    banks, items, dim = shape
    x, y = cast(_unit(banks, items, dim, seed=1)), cast(_unit(items, dim, seed=2))
    x = (x[0] if banks == 1 else x).clone().requires_grad_()
    y.requires_grad_()
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.tensor(SCALE, dtype=compute, device=x.device, requires_grad=True)
    value = loss(x, y, scale=scale, backend=backend, workspace=workspace).sum()
    dx, dy, dscale = torch.autograd.grad(value, [x, y, scale])
    terms = (x.detach().double() * dx.double()).abs().sum() / SCALE
    return {"loss": value, "dx": dx, "dy": dy, "dscale": dscale, f"dscale{TERMS}": terms}


def _losses() -> Iterator[Check]:
    shapes = [(1, items, dim) for dim, items in itertools.product(DIMS, ITEMS)]
    shapes += [(3, items, dim) for dim, items in itertools.product(DIMS, FEW)]
    for shape in shapes:
        yield from _checks_of("info_nce", ("bf16",), shape)
    for name, shape in itertools.product(LOSSES, [(1, 17, 20), (1, 300, 130), (1, 128, 512), (3, 100, 40)]):
        if shape[0] == 1 or name in ("info_nce", "reduce_similarity"):
            yield from _checks_of(name, ("fp32", "fp16", "tf32") + ("bf16",) * (name != "info_nce"), shape)


def _checks_of(name: str, arithmetics: Sequence[str], shape: tuple[int, ...]) -> Iterator[Check]:
    for arithmetic in arithmetics:
        half = DTYPES[arithmetic] != torch.float32
        # Kept E, and G from S again; small batches have kernels of their own in half precision.
        ways = [("kept", None, True), ("recomputed", 0, True)] + [("small", None, False)] * half
        for way, workspace, large in ways:
            label = f"{name} {'x'.join(map(str, shape))} {arithmetic} {way}"
            run = partial(_loss, loss=LOSSES[name], shape=shape, workspace=workspace)
            yield Check(label, "reduce_similarity", arithmetic, run, large)


# --- the others ------------------------------------------------------------------------------------------------------


def _normalize(cast: Cast, backend: str, *, shape: tuple[int, ...]) -> Tensors:
    x = cast(3 * _random(*shape, seed=3)).requires_grad_()
    out = ccu_fast.l2_normalize(x, backend=backend)
    (dx,) = torch.autograd.grad(out, x, cast(_random(*shape, seed=4)))
    return {"out": out, "dx": dx}


def _flips(cast: Cast, backend: str, *, rows: int, tokens: int, dim: int, k: int, options: Tensors) -> Tensors:
    """The changes of the loss by the chosen tokens, best first; independent of which tied token was chosen."""
    grad, table = _random(rows, dim, seed=5), cast(0.02 * _random(tokens, dim, seed=6))
    compute = torch.float64 if table.dtype == torch.float64 else torch.float32
    grad = grad.float().to(table.device, compute)
    extra = {name: t.to(table.device) for name, t in options.items()}
    found = ccu_fast.topk_flips(grad, ccu_fast.TokenTable(table, backend=backend), k, backend=backend, **extra)
    scores = (grad.double() @ table.double().T).gather(1, found.ids.clamp(min=0))
    return {"delta": found.delta, "scores": scores.to(compute)}


def _candidates(cast: Cast, backend: str, *, items: int, candidates: int, dim: int) -> Tensors:
    texts = cast(_unit(items, candidates, dim, seed=7))
    image, text = cast(_unit(items, dim, seed=8)), cast(_unit(items, dim, seed=9))
    return {"losses": ccu_fast.candidate_losses(texts, image, text, scale=SCALE, backend=backend)}


def _pgd(cast: Cast, backend: str, *, shape: tuple[int, ...], norm: str, channels: bool) -> Tensors:
    delta = cast(0.02 * _random(*shape, seed=10))
    grad, image = cast(_random(*shape, seed=11)), cast(torch.sigmoid(_random(*shape, seed=12)))
    out = torch.empty_like(delta)
    compute = torch.float64 if delta.dtype == torch.float64 else torch.float32
    eps = torch.tensor([0.02, 0.03, 0.04]).to(delta.device, compute).view(3, 1, 1) if channels else 0.03
    ccu_fast.pgd_step_(delta, grad, image, step=0.01, eps=eps, norm=norm, out=out, backend=backend)
    return {"delta": delta, "out": out}


def _store(cast: Cast, backend: str, *, item: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    images = cast(torch.sigmoid(_random(5, *item, seed=13)))
    index = torch.tensor([6, 0, 3, 3, 1], device=images.device)
    noise = cast((0.05 * _random(5, *item, seed=14)).clamp(-0.1, 0.1))
    exact = images.dtype == torch.float64
    # The store holds steps of a pixel's levels, or half the digits: float64 is asked to add what another store holds.
    store = ccu_fast.NoiseStore(8, item, dtype=dtype, device=images.device, backend=backend)
    store.scatter_add_clamp_(index, noise.float(), 0.06, checked=False)
    held = store.gather(index)
    if exact:
        return {"held": held.double(), "noisy": (images + held.double()).clamp(0, 1)}
    return {"held": held, "noisy": store.add_to(images, index)}


def _others() -> Iterator[Check]:
    for rows, dim in [(1, 3), (5, 8), (300, 40), (17, 130), (64, 512), (3, 3000)]:
        for arithmetic in ("fp32", "fp16", "bf16"):
            run: Compute = partial(_normalize, shape=(rows, dim))
            yield Check(f"l2_normalize {rows}x{dim} {arithmetic}", "l2_normalize", arithmetic, run)
    for rows, tokens, dim, k in [(1, 700, 8, 1), (5, 3000, 40, 16), (20, 3000, 130, 16), (300, 5000, 512, 64)]:
        some = torch.randint(2, (tokens,), generator=torch.Generator().manual_seed(15)).bool()
        for arithmetic in ("fp32", "fp16", "bf16"):
            for what, options in (("all", {}), ("allowed", {"allowed": some})):
                run = partial(_flips, rows=rows, tokens=tokens, dim=dim, k=k, options=options)
                yield Check(f"topk_flips {rows}x{tokens}x{dim} {arithmetic} {what}", "topk_flips", arithmetic, run)
    for items, candidates, dim in [(1, 1, 8), (17, 5, 40), (100, 3, 130), (128, 17, 512)]:
        for arithmetic in ("fp32", "fp16", "bf16"):
            run = partial(_candidates, items=items, candidates=candidates, dim=dim)
            name = f"candidate_losses {items}x{candidates}x{dim} {arithmetic}"
            yield Check(name, "candidate_losses", arithmetic, run)
    for shape, norm, channels in [
        ((2, 3, 5, 7), "linf", False),
        ((3, 3, 32, 32), "linf", True),
        ((3, 3, 17, 17), "l2", False),
    ]:
        for arithmetic in ("fp32", "fp16", "bf16"):
            run = partial(_pgd, shape=shape, norm=norm, channels=channels)
            name = f"pgd_step_ {'x'.join(map(str, shape))} {norm}{' channels' * channels} {arithmetic}"
            yield Check(name, "pgd_step_", arithmetic, run)
    for item, dtype in itertools.product([(3, 5, 7), (3, 32, 32)], [torch.int8, torch.float16, torch.float32]):
        for arithmetic in ("fp32", "fp16", "bf16"):
            run = partial(_store, item=item, dtype=dtype)
            name = f"NoiseStore {'x'.join(map(str, item))} {str(dtype).removeprefix('torch.')} {arithmetic}"
            yield Check(name, "noise_store", arithmetic, run)


# --- all of them -----------------------------------------------------------------------------------------------------

TINY = (" 1x17x20 ", " 1x3 ", " 17x130 ")


def checks(device: str, backend: str, *, tiny: bool = False) -> list[Check]:
    """What a backend serves on a device type; ``tiny``: a few of each, for Triton's interpreter."""
    found = [*_losses(), *_others()]
    if backend == "triton":
        found = [c for c in found if c.kernel in TRITON]
    if backend == "native":
        found = [c for c in found if device == "cpu" or c.kernel not in TRITON]
    if device == "cpu":  # one way there, and no TF32; the interpreter has no bf16 product
        lacking = ("tf32", "bf16") if backend == "triton" else ("tf32",)
        found = [c for c in found if c.arithmetic not in lacking]
    if tiny:
        found = [c for c in found if any(size in c.name for size in TINY) or c.kernel not in TRITON]
    assert len({c.name for c in found}) == len(found)
    return found
