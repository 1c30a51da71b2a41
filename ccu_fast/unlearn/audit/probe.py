"""Below the heads: what a linear classifier still finds in the frozen features, and a map of them."""

from __future__ import annotations

import numpy as np

from ccu_fast import check, extras
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import embed
from ccu_fast.unlearn.model import TwoModalityModel


def linear_probe(
    model: TwoModalityModel,
    *,
    forget: PairedData,
    retain: PairedData,
    retain_test: PairedData,
    forget_test: PairedData | None = None,
) -> dict[str, float | None]:
    """Accuracies of a linear classifier on the frozen visual embeddings.

    Standardised features, L2-regularised logistic regression (C = 1). It is trained by the reader, who has the data: on
    forget and retain set with their true labels when a class was forgotten, on the retain set alone for instances.

    Args:
        model: frozen.
        forget, retain: the two parts of the training set.
        retain_test: unseen items of the classes that stay.
        forget_test: unseen items of the forgotten class; None when instances were forgotten.

    Returns:
        ``"forget"``: the share of forgotten items that the classifier over all classes names right, on forget_test
        (instances: on the forget set); ``"forget_vs_rest"``: balanced accuracy of a two-class probe of the forgotten
        class against the others, on unseen items (instances: None); ``"retain"``: accuracy on retain_test. In [0, 1].
        A retrained model's are not 0: features learned on other classes describe the forgotten one too.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: Alain & Bengio 2016 (arXiv 1610.01644); on forgetting that is only in the head arXiv 2604.08271.
    """
    parts = {"forget": forget, "retain": retain, "retain_test": retain_test, "forget_test": forget_test}
    x = {name: embed(model, data)[0].double().cpu().numpy() for name, data in parts.items() if data is not None}
    y = {name: data.labels.cpu().numpy() for name, data in parts.items() if data is not None}
    whole_class = forget_test is not None
    judged = "forget_test" if whole_class else "forget"
    train_x, train_y = x["retain"], y["retain"]
    if whole_class:
        train_x, train_y = (np.concatenate([part["forget"], part["retain"]]) for part in (x, y))
    probe = _fit(train_x, train_y)
    result: dict[str, float | None] = {
        "forget": float(probe.score(x[judged], y[judged])),
        "forget_vs_rest": None,
        "retain": float(probe.score(x["retain_test"], y["retain_test"])),
    }
    if whole_class:
        two = _fit(train_x, np.repeat([True, False], [len(forget), len(retain)]), balanced=True)
        gone, kept = two.predict(x["forget_test"]), two.predict(x["retain_test"])
        result["forget_vs_rest"] = float(gone.mean() + (~kept).mean()) / 2
    return result


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
    points = np.concatenate([before, after])
    near = min(30.0, (len(points) - 1) / 3)  # neighbours of a point: at most as many as there are, three times over
    both = TSNE(n_components=2, init="pca", perplexity=near, random_state=seed).fit_transform(points)
    return [both[: len(before)], both[len(before) :]]


def _fit(x: np.ndarray, y: np.ndarray, *, balanced: bool = False):  # type: ignore[no-untyped-def]
    extras.require("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    weight = "balanced" if balanced else None
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight=weight)).fit(x, y)
