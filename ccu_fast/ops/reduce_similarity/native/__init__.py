"""On a CPU: library GEMMs in chunks, and C++ for all between them."""

from ccu_fast.ops.reduce_similarity.native.chunks import backward, forward, stash_shape

__all__ = ["backward", "forward", "stash_shape"]
