"""How far a result may be from the truth, defined only here."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(dtype: torch.dtype) -> float:
    """The standard deviation of a relative error that is uniform within eps / 2."""
    return torch.finfo(dtype).eps / 12**0.5


def assert_three_way(
    name: str,
    ours: Tensor,
    same_dtype: Tensor,
    exact: Tensor,
    *,
    ulps: float = 8,
    magnitude: float | None = None,
    noise: float = 0.0,
) -> None:
    """Ours may err twice as much as plain torch in the same dtype does, plus a few units in the last place::

        |ours - exact| <= 2 * max(|same_dtype - exact|, noise) + ulps * eps(ours.dtype) * magnitude

    Args:
        name: what is compared, for the message.
        ours: the result under test.
        same_dtype: plain torch's result, computed in the dtype under test.
        exact: plain torch's result in float64 from the same inputs.
        ulps: how many units in the last place are allowed where torch happens to be exact.
        magnitude: size of the terms that are summed. Default: the largest finite element of ``exact``; say it where
            large terms cancel.
        noise: of one number that is a sum of rounded terms, the standard deviation of what rounding adds. There is no
            largest error of many then, and torch's one may be next to nothing by luck.

    Infinities must be where the exact ones are, and there must be no NaN.
    """
    assert exact.dtype == torch.float64, f"{name}: the exact result is {exact.dtype}, expected float64"
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    if not ours.numel():
        return
    got, torchs = ours.detach().double(), same_dtype.detach().double()
    exact = exact.detach()
    finite = exact.isfinite()
    wrong = torch.where(finite, ~got.isfinite(), got != exact)
    assert not wrong.any(), _worst(
        name, wrong.double(), got, torchs, exact, "not finite where it should be, or not inf"
    )
    peers = finite & torchs.isfinite()
    torch_error = float((torchs - exact)[peers].abs().max()) if peers.any() else 0.0
    if magnitude is None:
        magnitude = float(exact[finite].abs().max()) if finite.any() else 0.0
    info = torch.finfo(ours.dtype)
    bound = 2 * max(torch_error, noise) + ulps * (info.eps * magnitude + info.smallest_normal * info.eps)
    error = torch.where(finite, (got - exact).abs(), 0)
    assert float(error.max()) <= bound, _worst(
        name, error, got, torchs, exact, f"error {float(error.max()):.3g} > {bound:.3g} (torch's own {torch_error:.3g})"
    )


def _worst(name: str, error: Tensor, got: Tensor, torchs: Tensor, exact: Tensor, what: str) -> str:
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return (
        f"{name}: {what}; worst at {list(index)}: ours {got[index].item():.9g}, "
        f"torch {torchs[index].item():.9g}, exact {exact[index].item():.9g}"
    )
