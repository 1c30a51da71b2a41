"""Membership inference from text alone: was the pair behind a name or caption trained on? No picture of it is shown.

"Text" is the other modality, whatever it is. For each text a search starts from several visual inputs that have nothing
to do with it and moves them to where the model embeds them next to the text. Texts that the model has met with a
picture let the search end elsewhere than texts that mean nothing. So gibberish, which surely was not trained on, shows
anomaly detectors what not to be a member looks like, and a text that most of them call an anomaly is called a member.

What is an anomaly to gibberish need not be a member: a sensible text that was never trained on is one too. Only unseen
texts of the same kind (:func:`told_apart`) and a retrained model can tell the two.

Source: TUNI (Li, Cheng & Jia 2024, arXiv 2405.14517) and UMID (Cheng et al. 2026, arXiv 2603.14222). Of both the
abstracts were read, and of TUNI a review of its method and the README of its code; the body of neither, and no code.
From these are the search through the image encoder by the cosine, repeated from random images; gibberish as known
non-members; the two signals, similarity to the text and variability among the repeats; anomaly detectors that vote. How
the two signals are computed, which detectors vote and all constants are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.unlearn.audit.membership import auc
from ccu_fast.unlearn.model import TwoModalityModel, TwoTowerModel, evaluating

FEATURES = ("similarity", "spread")
DETECTORS = ("isolation forest", "one-class SVM", "local outlier factor", "elliptic envelope")
MINIMUM = 40  # gibberish texts: the local outlier factor looks at 20 neighbours, the others at a distribution
STAGE = "text membership"

Tower = Callable[[Tensor], Tensor]


class NothingToMeasure(ValueError):
    """A model embeds all that it is asked about alike, or nowhere."""


@dataclass(frozen=True)
class TextMembership:
    """What text alone says of N texts.

    Attributes:
        similarity: fp64 ``[N]``, the mean over the restarts of the cosine that the search ended at.
        spread: fp64 ``[N]`` ≥ 0, the mean distance of the embeddings where it ended from their own mean.
        votes: bool ``[N, 4]``: which of :data:`DETECTORS` call a text an anomaly.
        score: fp64 ``[N]`` in (0, 1), how anomalous a text is among these N: its rank, the mean over the detectors.
    """

    similarity: Tensor
    spread: Tensor
    votes: Tensor
    score: Tensor

    @property
    def flags(self) -> Tensor:
        """Bool ``[N]``: more than half of the detectors call the text an anomaly, which makes it a member."""
        return 2 * self.votes.sum(1) > self.votes.shape[1]


def text_membership(
    model: TwoTowerModel | DualEncoder,
    texts: Tensor,
    gibberish: Tensor,
    starts: Tensor,
    *,
    steps: int = 50,
    rate: float = 0.05,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    contamination: float = 0.05,
    seed: int = 0,
    chunk: int = 1024,
    progress: Progress = silent,
) -> TextMembership:
    """Ask of each text, without any picture of it, whether it was trained on with one.

    The features of a text are those of :func:`text_features`. Four anomaly detectors of scikit-learn are fitted to the
    features of the gibberish, each standardised by its mean and deviation there, and judge those of the texts.

    Args:
        model: the model under attack, with ``embed_visual`` and ``embed_other``, or ``encode_image`` and
            ``encode_text``, which give unit vectors; not changed.
        texts: ``[N, ...]`` what its other tower takes.
        gibberish: ``[G, ...]`` of the same form (rows of token ids may be of another length), G ≥ 40: texts that were
            surely not trained on, see :func:`gibberish_of`.
        starts, steps, rate, bounds, chunk: as of :func:`text_features`.
        contamination: the share of the gibberish that each detector is fitted to call an anomaly, in [0.001, 0.5].
        seed: of the detectors' random choices, at least 0.
        progress: called as progress(stage, done, total, note), in inputs searched.

    Returns:
        Features, votes and score of each text. The same arguments give the same values.

    Raises:
        TypeError, ValueError: the model lacks a method; an argument is empty, not finite or of another form, dtype or
            device than it should be; too little gibberish, or gibberish whose features are all the same.
        ImportError: scikit-learn is not installed.

    Source: TUNI (arXiv 2405.14517) and UMID (arXiv 2603.14222); see the head of this file for what is theirs.

    >>> from ccu_fast.models.fusion import FusionModel
    >>> from ccu_fast.unlearn.audit import gibberish_of, text_membership
    >>> texts = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    >>> found = text_membership(FusionModel(3, 3, classes=4), texts, gibberish_of(texts, 40), torch.rand(2, 3), steps=2)
    >>> found.votes.shape, found.flags.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """
    check.number("contamination", contamination, low=0.001, high=0.5)
    check.integer("seed", seed, low=0)
    _check_texts("texts", texts, texts)
    _check_texts("gibberish", gibberish, texts)
    if len(gibberish) < MINIMUM:
        raise ValueError(
            f"gibberish: expected at least {MINIMUM} texts, which the detectors need, got {len(gibberish)}"
        )
    extras.require("sklearn")
    whole = len(starts) * (len(gibberish) + len(texts))
    asked_before = 0

    def told(stage: str, done: int, total: int, note: str) -> None:
        progress(stage, asked_before + done, whole, note)

    search: dict[str, Any] = {"steps": steps, "rate": rate, "bounds": bounds, "chunk": chunk, "progress": told}
    known = text_features(model, gibberish, starts, **search)
    asked_before = len(starts) * len(gibberish)
    asked = text_features(model, texts, starts, **search)
    for name, column in zip(FEATURES, known.T, strict=True):
        if float(column.max() - column.min()) == 0:
            raise NothingToMeasure(f"gibberish: expected texts that differ, got a {name} of {float(column[0])} for all")
    votes, score = _judged(known.numpy(), asked.numpy(), contamination, seed)
    return TextMembership(asked[:, 0], asked[:, 1], torch.from_numpy(votes), torch.from_numpy(score))


def text_features(
    model: TwoTowerModel | DualEncoder,
    texts: Tensor,
    starts: Tensor,
    *,
    steps: int = 50,
    rate: float = 0.05,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    chunk: int = 1024,
    progress: Progress = silent,
) -> Tensor:
    """Search for a visual input next to each text, from each start, and say where the searches end::

        x_r = starts[r];  t = embed_other(text)
        repeat steps times:  x_r ← bounded(x_r + step of Adam along the gradient of <embed_visual(x_r), t>)
        z_r = embed_visual(x_r)
        similarity = mean_r <z_r, t>          spread = mean_r |z_r - mean_r z_r|

    It is the *input* that moves. A free embedding would reach the text's own, cosine 1, for every text.

    Args:
        model: in evaluation mode while it is asked, then as before; its gradients are left alone.
        texts: ``[N, ...]`` what the other tower takes, N ≥ 1; floating-point ones finite.
        starts: ``[R, ...]`` floating-point inputs of the visual tower, R ≥ 2, the same for all texts: noise, such as
            ``torch.rand(8, 3, 224, 224)``, or public pictures. On the model's device and in its dtype; the search
            itself is in fp32, or in fp64 for fp64.
        steps: of the search, at least 1.
        rate: Adam's learning rate, > 0, in the unit of the inputs.
        bounds: the least and the greatest value of an input, to which each step is cut; None for none.
        chunk: so many inputs are searched at once, or R if that is more: what bounds the memory.
        progress: called as progress(stage, done, total, note), in inputs searched.

    Returns:
        fp64 ``[N, 2]`` on the CPU: similarity in [-1, 1] and spread ≥ 0.

    Raises:
        TypeError, ValueError: as of :func:`text_membership`; a model whose embeddings are not finite.

    Source: as of :func:`text_membership`; Kingma & Ba 2015 (arXiv 1412.6980).
    """
    embed_visual, embed_other = _towers(model)
    _check_texts("texts", texts, texts)
    check.tensor("starts", starts)
    if len(starts) < 2:
        raise ValueError(f"starts: expected at least 2 visual inputs, got {len(starts)}")
    check.finite("starts", starts)
    check.same("starts", starts, "texts", texts, dtype=False)
    check.integer("steps", steps, low=1)
    check.number("rate", rate, low=1e-12)
    check.integer("chunk", chunk, low=1)
    if bounds is not None:
        low, high = bounds
        if not check.number("bounds", low) < check.number("bounds", high):
            raise ValueError(f"bounds: expected the lower one first, got {bounds}")
    restarts, found = len(starts), []
    parts = texts.split(max(1, chunk // restarts))
    with evaluating(cast("TwoModalityModel", model)):
        for part in parts:
            target = embed_other(part)
            ends = _search(embed_visual, target.repeat_interleave(restarts, 0), starts, len(part), steps, rate, bounds)
            z, t = ends.double().unflatten(0, (len(part), restarts)), target.double()[:, None]
            spread = (z - z.mean(1, keepdim=True)).norm(dim=2).mean(1)
            found.append(torch.stack([(z * t).sum(2).mean(1), spread], 1).cpu())
            if not bool(found[-1].isfinite().all()):
                raise NothingToMeasure("model: expected finite embeddings, got NaN or infinity")
            progress(STAGE, restarts * sum(map(len, found)), restarts * len(texts), "")
    return torch.cat(found)


def told_apart(found: TextMembership, members: Tensor) -> dict[str, float | None]:
    """Say how well text alone tells known members from known non-members.

    Args:
        found: of :func:`text_membership`.
        members: bool ``[N]``, which of the texts were trained on; some, and not all.

    Returns:
        ``"precision"``: the share of members among the flagged texts, None where none is; chance is the share of
        members among all. ``"recall"``: the share of flagged texts among the members, and ``"false_alarms"`` among the
        others; where the two are equal nothing is told. ``"auc"`` of the score and ``"similarity_auc"`` of the
        similarity: 0.5 is chance, and far below tells as much as far above.

    Raises:
        TypeError, ValueError: members are no bools, of another number, or all alike.
    """
    check.tensor("members", members, dtypes=(torch.bool,), ndim=1)
    check.shape("members", members, [len(found.score)])
    members = members.cpu()
    if bool(members.all()) or not bool(members.any()):
        raise ValueError(f"members: expected members and others, got {int(members.sum())} of {len(members)}")
    flags = found.flags
    return {
        "precision": float(members[flags].double().mean()) if bool(flags.any()) else None,
        "recall": float(flags[members].double().mean()),
        "false_alarms": float(flags[~members].double().mean()),
        "auc": auc(found.score[members], found.score[~members]),
        "similarity_auc": auc(found.similarity[members], found.similarity[~members]),
    }


def _search(
    embed_visual: Tower,
    target: Tensor,
    starts: Tensor,
    count: int,
    steps: int,
    rate: float,
    bounds: tuple[float, float] | None,
) -> Tensor:
    """The embeddings ``[count * R, D]`` where the searches of so many texts end, one text after the other."""
    exact = torch.promote_types(starts.dtype, torch.float32)
    x = starts.to(exact).repeat(count, *[1] * (starts.ndim - 1)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate, maximize=True)
    for _ in range(steps):
        with torch.enable_grad():
            z = embed_visual(x.to(starts.dtype))
            if z.shape != target.shape:
                raise ValueError(
                    "model: expected embed_visual and embed_other to share one space [N, D], got shapes "
                    f"{list(z.shape)} and {list(target.shape)}"
                )
            [x.grad] = torch.autograd.grad((z * target).sum(), [x])
        optimizer.step()
        if bounds is not None:
            x.clamp_(*bounds)
    return embed_visual(x.to(starts.dtype))


def _judged(known: np.ndarray, asked: np.ndarray, contamination: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The votes ``[N, 4]`` of the detectors that know the gibberish, and the mean of each text's ranks ``[N]``."""
    from sklearn.covariance import EllipticEnvelope
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import OneClassSVM

    detectors = (
        IsolationForest(contamination=contamination, random_state=seed),
        OneClassSVM(nu=contamination),
        LocalOutlierFactor(novelty=True, contamination=contamination),
        EllipticEnvelope(contamination=contamination, support_fraction=1.0, random_state=seed),
    )
    scale = StandardScaler().fit(known)
    known, asked = scale.transform(known), scale.transform(asked)
    fitted = [detector.fit(known) for detector in detectors]
    votes = np.stack([detector.predict(asked) < 0 for detector in fitted], 1)
    return votes, np.mean([_ranks(-detector.score_samples(asked)) for detector in fitted], 0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """The share of values below each, its equals counted half."""
    below, not_above = (np.searchsorted(np.sort(values), values, side=side) for side in ("left", "right"))
    return (below + not_above) / (2 * len(values))


def _towers(model: Any) -> tuple[Tower, Tower]:
    """The two encoders of a model: those of two towers, or of a dual encoder."""
    for names in (("embed_visual", "embed_other"), ("encode_image", "encode_text")):
        visual, other = (getattr(model, name, None) for name in names)
        if callable(visual) and callable(other):
            return visual, other
    raise TypeError(f"model: expected the methods embed_visual and embed_other, got a {type(model).__name__} without")


def _check_texts(name: str, given: Any, texts: Tensor) -> None:
    """Raise an error unless these are inputs of the other tower, finite and of the form of texts."""
    check.tensor(name, given, dtypes=None)
    if given.ndim < 2 or len(given) == 0:
        raise ValueError(f"{name}: expected at least one text [N, ...], got shape {list(given.shape)}")
    check.same(name, given, "texts", texts)
    if given.is_floating_point() or given.ndim != texts.ndim:
        check.shape(name, given[:1], [1, *texts.shape[1:]])
    if given.is_floating_point():
        check.finite(name, given)
