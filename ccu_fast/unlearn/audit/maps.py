"""Embeddings in the plane, before and after."""

from __future__ import annotations

import numpy as np

from ccu_fast import check, extras


def embedding_map(before: np.ndarray, after: np.ndarray, *, kind: str = "pca", seed: int = 0) -> list[np.ndarray]:
    """Both ``[N, D]`` embeddings in one plane: two ``[N, 2]`` arrays for a before/after picture.

    Args:
        before, after: the same items under two models.
        kind: "pca" (the plane of ``before``; distances stay comparable) or "tsne" (both together).
        seed: of t-SNE.

    Raises:
        ValueError: unknown kind, different shapes.
        ImportError: scikit-learn is not installed.
    """
    check.one_of("kind", kind, ("pca", "tsne"))
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(f"after: expected shape {list(before.shape)} (that of before), got {list(after.shape)}")
    extras.require("sklearn")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if kind == "pca":
        plane = PCA(n_components=2, svd_solver="full").fit(before)
        return [plane.transform(before), plane.transform(after)]
    both = TSNE(n_components=2, init="pca", random_state=seed).fit_transform(np.concatenate([before, after]))
    return [both[: len(before)], both[len(before) :]]
