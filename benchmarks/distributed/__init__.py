"""The losses over ranks: equality, traffic and FLOPs counted on real processes, and a model on paper of large clusters.

    python -m benchmarks.distributed equality|volume|flops|memory|model

``counting`` counts, ``measured`` runs the ranks, ``model`` computes.
"""
