"""What a sceptical reader measures on an unlearned model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import accuracies, embed
from ccu_fast.unlearn.protocol import TwoModalityModel

MODALITIES = ("visual", "other", "fused")


def audit(
    model: TwoModalityModel,
    *,
    forget: PairedData,
    retain: PairedData,
    retain_test: PairedData,
    forget_test: PairedData | None = None,
) -> dict[str, object]:
    """Accuracies and the membership attack.

    Args:
        model: the model to judge.
        forget, retain: the two parts of the training set.
        retain_test: unseen items of the classes that stay.
        forget_test: unseen items of the forgotten class; None when instances are forgotten.

    Returns:
        ``{"visual": {...}, "other": {...}, "fused": {...}, "mia_auc": float}``, each modality with the accuracies
        "forget_train", "forget_test" (None without such items), "retain_train" and "retain_test" in [0, 1].
        mia_auc is :func:`membership_auc` of the forget set against unseen items alike: forget_test, else retain_test.
        Judge it by its distance from a retrained model's, not by how low it is.
    """
    parts = {
        "forget_train": forget,
        "forget_test": forget_test,
        "retain_train": retain,
        "retain_test": retain_test,
    }
    measured = {name: None if data is None else accuracies(model, data) for name, data in parts.items()}
    result: dict[str, object] = {
        modality: {name: None if a is None else a[modality] for name, a in measured.items()} for modality in MODALITIES
    }
    result["mia_auc"] = membership_auc(model, forget, retain_test if forget_test is None else forget_test)
    return result


def membership_auc(model: TwoModalityModel, members: PairedData, unseen: PairedData) -> float:
    """How well the visual head's confidence in the true class tells members from unseen items: the area under the
    ROC curve, 0.5 for not at all.

    Source: the confidence attack of Yeom et al. 2018 (arXiv 1709.01604) as a ranking.
    """
    return auc(_confidence(model, members), _confidence(model, unseen))


def auc(positive: Tensor, negative: Tensor) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs of two score vectors.

    Raises:
        ValueError: one of them is empty.
    """
    for name, scores in (("positive", positive), ("negative", negative)):
        if len(scores) == 0:
            raise ValueError(f"{name}: expected at least one score, got none")
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive.contiguous())
    not_above = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return (below + not_above).double().mean().item() / (2 * len(negative))


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
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("embedding_map needs scikit-learn: pip install scikit-learn") from error
    if kind == "pca":
        plane = PCA(n_components=2, svd_solver="full").fit(before)
        return [plane.transform(before), plane.transform(after)]
    both = TSNE(n_components=2, init="pca", random_state=seed).fit_transform(np.concatenate([before, after]))
    return [both[: len(before)], both[len(before) :]]


@torch.no_grad()
def _confidence(model: TwoModalityModel, data: PairedData) -> Tensor:
    visual, _ = embed(model, data)
    was_training = model.training
    model.eval()
    logits = model.classify_visual(visual).double()
    model.train(was_training)
    # The logit of the true class against the rest orders items as its probability does, without rounding to 1.
    own = logits.gather(1, data.labels[:, None])[:, 0]
    rest = logits.scatter(1, data.labels[:, None], -torch.inf).logsumexp(1)
    return own - rest
