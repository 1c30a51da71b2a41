"""Forward passes in half precision: autocast around a model's towers and heads, whose parameters stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.unlearn.model import HEADS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOWERS = ("embed_visual", "embed_other")

Module = TypeVar("Module", bound=nn.Module)


def under_autocast(model: Module, name: str) -> Module:
    """The same model, changed in place: its towers and heads compute under ``torch.autocast``.

    What they return has the dtype of the parameters again, and embeddings are made unit vectors anew: rounded to bf16
    they are up to .4 % too long or too short. All else, the losses, Adam and the figures, is computed as without.

    Args:
        model: with the methods of :class:`ccu_fast.unlearn.model.TwoTowerModel`; its copies do the same.
        name: "fp32", which changes nothing, "bf16" or "fp16".
    """
    dtype, own = DTYPES[name], type(model)
    if dtype == torch.float32:
        return model
    plain = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def within(method: str) -> Callable[..., Tensor]:
        compute: Callable[..., Tensor] = getattr(own, method)

        def call(self: Any, *inputs: Tensor) -> Tensor:
            with torch.autocast(inputs[0].device.type, dtype=dtype):
                found = compute(self, *inputs)
            return F.normalize(found.to(plain), dim=-1) if method in TOWERS else found.to(plain)

        return call

    methods = [*TOWERS, *(f"classify_{head}" for head in HEADS)]
    found = {method: within(method) for method in methods if callable(getattr(own, method, None))}
    model.__class__ = type(own.__name__, (own,), found)
    return model
