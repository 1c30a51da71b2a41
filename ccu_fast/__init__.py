"""Fused kernels for contrastive losses and gradient token scoring, and two systems built on them."""

import importlib
from typing import TYPE_CHECKING, Any

from ccu_fast import patch
from ccu_fast._version import __version__ as __version__
from ccu_fast.distributed.distill_clip import DistillClipLoss
from ccu_fast.distributed.key_queue import KeyQueue
from ccu_fast.distributed.open_clip import ClipLoss, SigLipLoss
from ccu_fast.losses.distillation import distill
from ccu_fast.losses.functional import info_nce, inverse_info_nce, sigmoid_loss, sup_con
from ccu_fast.losses.modules import DistillLoss, InfoNCE, InverseInfoNCE, SigmoidLoss, SupCon
from ccu_fast.ops.l2_normalize.api import l2_normalize
from ccu_fast.ops.noise_store.api import NoiseStore
from ccu_fast.ops.pgd_step.api import check_pgd_steps, pgd_step_
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.prefixes import reduce_prefixes
from ccu_fast.ops.reduce_similarity.relations import ALL, OTHER, SAME, SELF, Relation
from ccu_fast.ops.topk_flips.api import Flips, TokenTable, candidate_losses, topk_flips

if TYPE_CHECKING:
    from ccu_fast import distributed as distributed
    from ccu_fast import info as info
    from ccu_fast.unlearn import unlearn as unlearn

__all__ = [
    "ALL",
    "OTHER",
    "SAME",
    "SELF",
    "ClipLoss",
    "DistillClipLoss",
    "DistillLoss",
    "Flips",
    "InfoNCE",
    "InverseInfoNCE",
    "KeyQueue",
    "NoiseStore",
    "Relation",
    "SigLipLoss",
    "SigmoidLoss",
    "SupCon",
    "TokenTable",
    "candidate_losses",
    "check_pgd_steps",
    "distill",
    "info_nce",
    "inverse_info_nce",
    "l2_normalize",
    "patch",
    "pgd_step_",
    "reduce_prefixes",
    "reduce_similarity",
    "sigmoid_loss",
    "sup_con",
    "topk_flips",
]


def __getattr__(name: str) -> Any:
    # Imported when they are used: the losses need none of them.
    if name in ("distributed", "info", "mem", "unlearn"):
        return importlib.import_module(f"ccu_fast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
