"""lightly: NTXentLoss, within a batch (SimCLR) and against its memory bank (MoCo)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.losses.formulas import softplus
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import OTHER, SAME
from ccu_fast.patch.info_nce import against_keys, are_keys, is_temperature
from ccu_fast.patch.site import (
    Site,
    are_pairs,
    cross_entropy_dtype,
    is_mean_cross_entropy,
    is_stock,
    torch_is_stock,
)

BANK = "lightly.models.modules.memory_bank.MemoryBankModule"


def sites() -> list[Site]:
    """What is replaced."""
    module = importlib.import_module("lightly.loss.ntx_ent_loss")

    def loss(original: Any, self: Any, out0: Tensor, out1: Tensor) -> Any:
        bank, heat = self.memory_bank, self.temperature
        usual = (
            torch_is_stock()
            and getattr(module, "nn", None) is nn
            and is_mean_cross_entropy(self.cross_entropy)
            and not self.gather_distributed
            and are_pairs(out0, out1)
            and len(out0) > 1
            and is_temperature(heat, out0)
            and is_stock(bank.forward, f"{BANK}.forward")
            and is_stock(bank._dequeue_and_enqueue, f"{BANK}._dequeue_and_enqueue")
        )
        if not usual or not (tuple(bank.size)[:1] == (0,) or _fits(bank, out0)):
            return NotImplemented
        dtype = cross_entropy_dtype(out0)
        x, y = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        y, keys = bank.forward(y, update=x.requires_grad)
        if keys is None:
            return nt_xent_loss(x, y, scale=1 / heat).to(dtype)
        return against_keys(x, y, keys.T, scale=1 / heat).mean().to(dtype)

    return [Site(module.NTXentLoss, "forward", ("self", "out0", "out1"), loss)]


def nt_xent_loss(x: Tensor, y: Tensor, *, scale: float | Tensor) -> Tensor:
    """NT-Xent of two views: each against its other view, and against all of both but itself::

        z = torch.cat([x, y]);  s = scale * z @ z.T
        mean(logsumexp(s[i, j] for j != i) - s[i, i + N])

    Args:
        x: ``[N, D]``.
        y: ``[N, D]``, N ≥ 2.
        scale: number or one-element tensor; 1 / temperature.

    Source: Chen et al. 2020 (arXiv 2002.05709), eq. 1.
    """
    both = torch.cat([x, y])
    labels = torch.arange(len(x), device=x.device).repeat(2)
    spec = [("lse", OTHER), ("sum", SAME)]
    (rest, own), _ = reduce_similarity(both, both, scale=scale, row_labels=labels, rows=spec)
    return softplus(rest - own).mean()


def _fits(bank: Any, x: Tensor) -> bool:
    """Whether a bank's vectors are like the rows of x. Asking it changes it, so this is asked before."""
    return bank.feature_dim_first and are_keys(x, bank.bank)
