"""The contrastive losses of one process: formulas over :func:`ccu_fast.reduce_similarity`, functions and modules."""

from ccu_fast.losses.distillation import distill
from ccu_fast.losses.functional import info_nce, inverse_info_nce, sigmoid_loss, sup_con
from ccu_fast.losses.modules import DistillLoss, InfoNCE, InverseInfoNCE, SigmoidLoss, SupCon

__all__ = [
    "DistillLoss",
    "InfoNCE",
    "InverseInfoNCE",
    "SigmoidLoss",
    "SupCon",
    "distill",
    "info_nce",
    "inverse_info_nce",
    "sigmoid_loss",
    "sup_con",
]
