"""On a GPU: Triton kernels, and library GEMMs for the gradients."""

from ccu_fast.ops.reduce_similarity.triton.passes import backward, forward, stash_shape

__all__ = ["backward", "forward", "stash_shape"]
