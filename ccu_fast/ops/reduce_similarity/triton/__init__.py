"""reduce_similarity on a GPU: Triton kernels, and library GEMMs for the gradients."""

from ccu_fast.ops.reduce_similarity.triton.backward_pass import backward
from ccu_fast.ops.reduce_similarity.triton.forward_pass import forward
from ccu_fast.ops.reduce_similarity.triton.plan import stash_shape

__all__ = ["backward", "forward", "stash_shape"]
