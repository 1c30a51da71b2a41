"""All figures of one model in one call."""

from __future__ import annotations

from ccu_fast.data.paired import PairedData
from ccu_fast.runs.retrieval import recall_at
from ccu_fast.unlearn.audit.membership import auc, certainty, confidence
from ccu_fast.unlearn.audit.probe import linear_probe
from ccu_fast.unlearn.audit.relearn import relearn_steps
from ccu_fast.unlearn.audit.summary import MODALITIES
from ccu_fast.unlearn.loop import Answers, answers, partner_ranks, right_shares
from ccu_fast.unlearn.model import TwoModalityModel


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
        items), "retain_train" and "retain_test" in [0, 1]; without heads or labels the share of pairs whose partner
        comes first among all training pairs, or all unseen ones. ``"mia_auc"`` and ``"mia_entropy_auc"`` (None without
        labels): ``membership_auc`` of the forget set against forget_test, or retain_test where there is none. When deep
        ``"probe"`` (:func:`linear_probe`) and ``"relearn_steps"`` (:func:`relearn_steps`). Without heads or labels
        ``"retrieval"``: by set R@1, R@5 and R@10 in both directions ("i2t@1" is from the visual to the other modality),
        "forget" and "retain" among all training pairs, "forget_test" and "retain_test" among all unseen ones. Each is
        to be compared with a retrained model's.

    Raises:
        ValueError: an empty set.
        ImportError: deep without scikit-learn.

    Source: ``membership_auc`` and :func:`linear_probe` name theirs.

    >>> from ccu_fast.models.fusion import FusionModel
    >>> data = ccu_fast.unlearn.PairedData(torch.rand(8, 3), torch.rand(8, 3), torch.arange(8) % 4)
    >>> parts = {"forget": data[data.labels == 0], "retain": data[data.labels > 0], "retain_test": data}
    >>> sorted(ccu_fast.unlearn.audit(FusionModel(3, 3, classes=4), **parts))
    ['fused', 'mia_auc', 'mia_entropy_auc', 'other', 'visual']
    """
    given = {"forget": forget, "retain": retain, "retain_test": retain_test, "forget_test": forget_test}
    for name, data in given.items():
        if data is not None and len(data) == 0:
            raise ValueError(f"{name}: expected at least one item, got none")
    parts = {"forget_train": forget, "forget_test": forget_test, "retain_train": retain, "retain_test": retain_test}
    found = {name: answers(model, data) for name, data in parts.items() if data is not None}
    labelled = all(part.logits for part in found.values())
    measured: dict[str, dict[str, float]] = {}
    recalls: dict[str, dict[str, float]] = {}
    for pool in (("forget_train", "retain_train"), ("forget_test", "retain_test")):  # pairs choose among these
        names = [name for name in pool if name in found]
        if labelled:
            measured |= zip(names, right_shares(*(found[name] for name in names)), strict=True)
            continue
        for name, recalled in zip(names, _recalls([found[name] for name in names]), strict=True):
            recalls[name.removesuffix("_train")] = recalled
            measured[name] = {"visual": recalled["i2t@1"], "other": recalled["t2i@1"]}
    result: dict[str, object] = {
        modality: {name: measured[name][modality] if name in measured else None for name in parts}
        for modality in MODALITIES
        if all(modality in shares for shares in measured.values())
    }
    members, unseen = found["forget_train"], found.get("forget_test", found["retain_test"])
    result["mia_auc"] = auc(confidence(members), confidence(unseen))
    result["mia_entropy_auc"] = auc(certainty(members), certainty(unseen)) if "visual" in members.logits else None
    if deep:
        result["probe"] = linear_probe(model, **given)  # type: ignore[arg-type]
        result["relearn_steps"] = relearn_steps(model, forget, retain)
    if not labelled:
        result["retrieval"] = recalls
    return result


def _recalls(parts: list[Answers]) -> list[dict[str, float]]:
    """R@k of each part among all of them."""
    return [
        {
            f"{arrow}@{k}": share
            for side, arrow in (("visual", "i2t"), ("other", "t2i"))
            for k, share in recall_at(ranks[side]).items()
        }
        for ranks in partner_ranks(*parts)
    ]
