"""laion-clap: ClipLoss, on one process or several, with the two more heads of ``mlp_loss`` too.

The package puts its own folder on the path and imports its parts as ``clap_module``, so that one file may be two
modules: of those that are imported each is patched. ``weight_loss_kappa`` and horovod stay with the library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.losses.functional import info_nce
from ccu_fast.patch.site import (
    Site,
    are_pairs,
    arguments,
    cross_entropy_dtype,
    is_one_number,
    is_stock,
    torch_is_stock,
)

MODULES = ("clap_module.loss", "laion_clap.clap_module.loss")
PARAMETERS = (
    *("self", "audio_features", "text_features", "logit_scale_a", "logit_scale_t"),
    *("audio_features_mlp", "text_features_mlp"),
)


def sites() -> list[Site]:
    """What is replaced."""
    if not any(name in sys.modules for name in MODULES):
        importlib.import_module("laion_clap")
    return [
        Site(sys.modules[name].ClipLoss, "forward", PARAMETERS, _with(sys.modules[name]), package=name.split(".")[0])
        for name in MODULES
        if name in sys.modules
    ]


def _with(module: Any) -> Callable[..., Any]:
    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        theirs, *given = (arguments(original, args, kwargs)[name] for name in PARAMETERS)
        audio, text, scale, other_scale, audio_mlp, text_mlp = given
        features = [audio, text, audio_mlp, text_mlp] if theirs.mlp_loss else [audio, text]
        scales = [scale, other_scale] if theirs.mlp_loss else [scale]
        usual = (
            torch_is_stock()
            and getattr(module, "F", None) is F
            and not (theirs.weighted_loss or theirs.use_horovod)
            and all(are_pairs(audio, other) for other in features[1:])
            and all(is_one_number(s, audio) for s in scales)
            and (theirs.world_size == 1 or _is_one_of_a_group(theirs, module))
        )
        if not usual:
            return NotImplemented
        every = features
        if theirs.world_size > 1:
            names = ("audio_features", "text_features", "audio_features_mlp", "text_features_mlp")
            options = ("local_loss", "gather_with_grad", "rank", "world_size", "use_horovod", "mlp_loss")
            every = module.gather_features(
                **dict(zip(names, features, strict=False)), **{name: getattr(theirs, name) for name in options}
            )
        place = theirs.rank * len(audio) if theirs.local_loss and theirs.world_size > 1 else None
        # The first scale is for audio with the second head of text, where there is one, the second for the reverse.
        heads = [(0, 3), (2, 1)] if theirs.mlp_loss else [(0, 1)]
        losses = [
            _both_ways([features[i] for i in head], [every[i] for i in head], s, place)
            for head, s in zip(heads, scales, strict=True)
        ]
        return (sum(losses[1:], losses[0]) / len(losses)).to(cross_entropy_dtype(audio))

    return forward


def _both_ways(own: list[Tensor], every: list[Tensor], scale: float | Tensor, place: int | None) -> Tensor:
    """InfoNCE of all audio and text, or of a process's own rows, which begin at ``place``, against all."""
    if place is None:
        return info_nce(*every, scale=scale)
    ids = torch.arange(len(every[0]), device=own[0].device)
    keys: dict[str, Any] = {"row_ids": ids[place : place + len(own[0])], "col_ids": ids}
    sides = [info_nce(x, y, scale=scale, symmetric=False, **keys) for x, y in zip(own, reversed(every), strict=True)]
    return (sides[0] + sides[1]) / 2


def _is_one_of_a_group(theirs: Any, module: Any) -> bool:
    """Whether the library will gather with its own function over the default group, as torch knows it."""
    if not (dist.is_available() and dist.is_initialized()) or torch.compiler.is_compiling():
        return False
    here = (dist.get_rank(), dist.get_world_size()) == (theirs.rank, theirs.world_size)
    return here and is_stock(module.gather_features, f"{module.__name__}.gather_features")
