"""All figures of one model in one call."""

from __future__ import annotations

import torch

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.audit.membership import membership_auc
from ccu_fast.unlearn.audit.probe import linear_probe
from ccu_fast.unlearn.audit.relearn import relearn_steps
from ccu_fast.unlearn.audit.retrieval import recall
from ccu_fast.unlearn.loop import accuracies
from ccu_fast.unlearn.model import TwoModalityModel, heads

MODALITIES = ("visual", "other", "fused")


def audit(
    model: TwoModalityModel,
    *,
    forget: PairedData,
    retain: PairedData,
    retain_test: PairedData,
    forget_test: PairedData | None = None,
    deep: bool = False,
) -> dict[str, object]:
    """Measure a model's accuracies, attack it and, when asked, look for what is left below its heads.

    Args:
        model: the model to judge, with or without heads; not changed.
        forget, retain: the two parts of the training set.
        retain_test: unseen items of the classes that stay.
        forget_test: unseen items of the forgotten class; None when instances or pairs are forgotten.
        deep: also measure the linear probe and the relearning time; needs labels and scikit-learn.

    Returns:
        For each modality whose head the model has, the accuracies "forget_train", "forget_test" (None without such
        items), "retain_train" and "retain_test" in [0, 1]; without heads or labels the share of pairs whose partner is
        the nearest. ``"mia_auc"`` and ``"mia_entropy_auc"`` (None without labels): :func:`membership_auc` of the
        forget set against forget_test, or retain_test where there is none. When deep ``"probe"``
        (:func:`linear_probe`) and ``"relearn_steps"`` (:func:`relearn_steps`). Without labels ``"retrieval"``:
        :func:`recall` of the forget and the retain set among both. Each is to be compared with a retrained model's.

    Raises:
        ValueError: an empty set.
        ImportError: deep without scikit-learn.

    Source: :func:`membership_auc` and :func:`linear_probe` name theirs.

    >>> from ccu_fast.models.fusion import FusionModel
    >>> data = ccu_fast.unlearn.PairedData(torch.rand(8, 3), torch.rand(8, 3), torch.arange(8) % 4)
    >>> parts = {"forget": data[data.labels == 0], "retain": data[data.labels > 0], "retain_test": data}
    >>> sorted(ccu_fast.unlearn.audit(FusionModel(3, 3, classes=4), **parts))
    ['fused', 'mia_auc', 'mia_entropy_auc', 'other', 'visual']
    """
    parts = {
        "forget_train": forget,
        "forget_test": forget_test,
        "retain_train": retain,
        "retain_test": retain_test,
    }
    measured = {name: None if data is None else accuracies(model, data) for name, data in parts.items()}
    unseen = retain_test if forget_test is None else forget_test
    labelled = forget.labelled and "visual" in heads(model)
    result: dict[str, object] = {
        modality: {name: None if a is None else a[modality] for name, a in measured.items()}
        for modality in MODALITIES
        if all(a is None or modality in a for a in measured.values())
    }
    result["mia_auc"] = membership_auc(model, forget, unseen)
    result["mia_entropy_auc"] = membership_auc(model, forget, unseen, attack="entropy") if labelled else None
    if deep:
        result["probe"] = linear_probe(
            model, forget=forget, retain=retain, retain_test=retain_test, forget_test=forget_test
        )
        result["relearn_steps"] = relearn_steps(model, forget, retain)
    if not labelled:
        both = _joined(forget, retain)
        result["retrieval"] = {
            "forget": recall(model, forget, among=both),
            "retain": recall(model, retain, among=both),
        }
    return result


def _joined(one: PairedData, two: PairedData) -> PairedData:
    parts = [torch.cat([getattr(one, name), getattr(two, name)]) for name in ("visual", "other", "ids")]
    return PairedData(parts[0], parts[1], ids=parts[2])
