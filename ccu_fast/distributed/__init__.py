"""The losses over several ranks, and batches larger than memory.

    info_nce, inverse_info_nce, sup_con, sigmoid_loss,
    distill                                             the global batch's loss; each rank holds some of its items
    reduce_similarity                                   the primitive under them
    cached_step                                         gradients of a batch whose activations do not fit (GradCache)
    average_gradients                                   for parameters that no wrapper averages

``ranks`` talks to the other ranks, ``agreement`` finds out whether they fit together, ``blocks`` computes, gathered or
around a ring.
"""

from ccu_fast.distributed.gradcache import cached_step
from ccu_fast.distributed.losses import distill, info_nce, inverse_info_nce, sigmoid_loss, sup_con
from ccu_fast.distributed.parameters import average_gradients
from ccu_fast.distributed.similarity import reduce_similarity

__all__ = [
    "average_gradients",
    "cached_step",
    "distill",
    "info_nce",
    "inverse_info_nce",
    "reduce_similarity",
    "sigmoid_loss",
    "sup_con",
]
