"""The audit in words: does the model forget as retraining would, and if not, in which way does it fail?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ccu_fast import check
from ccu_fast.unlearn.audit.summary import gaps

# "undecided" is for a run that nothing says enough about.
KINDS = ("catastrophic", "ineffective", "over-generalised", "passed", "undecided")
CATASTROPHIC, INEFFECTIVE, OVER_GENERALISED, PASSED, UNDECIDED = KINDS
COLLAPSE = 10.0  # points lost on retained data from which on a loss is called catastrophic
CHANCE = 0.5  # the area of an attack that knows nothing
HEADS = {"visual": "visual accuracy", "other": "the other modality's accuracy", "fused": "fused accuracy"}
SETS = {
    "forget_train": "the forget set",
    "forget_test": "unseen items of the forgotten class",
    "retain_train": "the retain set",
    "retain_test": "unseen items",
}


@dataclass(frozen=True)
class Verdict:
    """How a model forgets.

    Attributes:
        kind: "passed"; "catastrophic" (retained knowledge collapses), "ineffective" (what was to be forgotten is still
            known) or "over-generalised" (more is forgotten than was asked): of several "catastrophic", or else that of
            the largest difference; "undecided" when the figures do not tell.
        text: everything that is wrong, in words, the worst first.
    """

    kind: str
    text: str

    @property
    def brief(self) -> str:
        """The kind with the worst that is wrong, and of the rest what it is but no figures; "passed" alone."""
        worst, *rest = self.text.split("; ")
        said = [] if self.kind == PASSED else [worst]
        return ": ".join([self.kind, "; ".join(said)] if said else [self.kind]) + "".join(
            f"; {text.partition(':')[0]}" for text in rest
        )


def verdict(
    values: Mapping[str, Any], gold: Mapping[str, Any], *, sizes: Mapping[str, int] | None = None, tolerance: float = 2
) -> Verdict:
    """Say in words how an unlearned model differs from a retrained one.

    A difference counts when it is larger than ``tolerance`` and, where the sizes are given, than two standard errors of
    the difference of two shares (Agresti and Caffo's, which is not 0 at 0 and 1) or of two areas under the curve (Mann
    and Whitney's). Both models are judged on the same items, yet the errors are those of independent ones: training
    again with another seed moves a retrained model's figures too.

    Retained data is lost where an accuracy on the retain set or on unseen items is lower than gold's: "catastrophic"
    from 10 points on, "over-generalised" below. On the forget set a visual or fused accuracy above gold's is
    "ineffective"; one below it, or one of the other modality below it, is "over-generalised". The membership attack is
    judged by its distance from 0.5: where its area differs from gold's and forgotten items are easier to tell from
    unseen ones than after retraining, the model is "ineffective" if it is surer of them than of unseen ones and
    "over-generalised" if it is less sure. Harder is said but is no failure.

    Args:
        values, gold: what :func:`ccu_fast.unlearn.audit.audit` gives for the model and for the retrained one, or means
            over seeds of it (:func:`ccu_fast.unlearn.audit.mean_figures`).
        sizes: how many independent items "forget_train", "forget_test", "retain_train" and "retain_test" have: things,
            not views of them; of means over seeds the sum. None: ``tolerance`` alone decides.
        tolerance: in points, ≥ 0.

    Returns:
        The verdict.

    Raises:
        ValueError: the two have no figure in common; tolerance below 0.

    Source: the kinds of failure are those of SALMUBench (arXiv 2603.26316); Agresti & Caffo 2000
    (doi 10.1080/00031305.2000.10474560).

    >>> from ccu_fast.unlearn.audit import verdict
    >>> values, gold = {"visual": {"forget_train": 0.75}}, {"visual": {"forget_train": 0.875}}
    >>> found = verdict(values, gold)
    >>> found.kind
    'over-generalised'
    >>> found.text
    'forgets more than retraining would: visual accuracy on the forget set is .75, retrained .88'
    >>> verdict(values, gold, sizes={"forget_train": 20}).kind  # could be chance
    'passed'
    """
    found = _findings(values, gold, sizes or {}, tolerance, ("retrained", "retraining would", "after retraining"))
    return _told(found, Verdict(PASSED, "forgets as retraining would"))


def verdict_without_gold(
    values: Mapping[str, Any],
    before: Mapping[str, Any],
    *,
    forget: str = "class",
    sizes: Mapping[str, int] | None = None,
    tolerance: float = 2,
) -> Verdict:
    """Say in words how a model has forgotten, without a retrained one to compare it with.

    What can be expected takes the place of gold: a forgotten class is never named from the visual half; forgotten
    instances are named as often as unseen items were before, and no attack tells them from those; the other modality
    and the retained data are as before.

    Args:
        values, before: what :func:`ccu_fast.unlearn.audit.audit` gives for the model and for the one before; parts of
            it, such as accuracies without those on unseen items, will do.
        forget: "class", "instances" or "pairs". Of pairs nothing is expected but the attack's failure: among which
            pairs a partner comes first depends on how many there are.
        sizes, tolerance: as of :func:`verdict`.

    Returns:
        The verdict; "undecided" where nothing is wrong but the figures tell nothing: instances or pairs were
        forgotten and no figure of unseen items is there; the class was not known before either; the retained data is
        known more than twice as well as before, so that the model was hardly measured as it is used.

    Raises:
        ValueError: an unknown kind of forgetting; the two have no figure in common; tolerance below 0.

    Source: as of :func:`verdict`.

    >>> from ccu_fast.unlearn.audit import verdict_without_gold
    >>> before = {"visual": {"forget_train": 1.0, "retain_train": 1.0}}
    >>> after = {"visual": {"forget_train": 0.25, "retain_train": 1.0}}
    >>> verdict_without_gold(after, before).text
    'still knows what it should forget: visual accuracy on the forget set is .25, expected .00'
    """
    check.one_of("forget", forget, ("class", "instances", "pairs"))
    expected: dict[str, Any] = {name: dict(v) if isinstance(v, Mapping) else v for name, v in before.items()}
    for modality in ("visual", "other", "fused"):
        parts = expected.setdefault(modality, {})
        if forget == "pairs":
            parts |= {"forget_train": None, "forget_test": None}
        elif modality == "visual" and forget == "class":
            parts |= {"forget_train": 0.0, "forget_test": 0.0}
        elif modality != "other":
            unseen = parts.get("retain_test") if forget == "instances" else None  # a class's fused answer may be either
            parts |= {"forget_train": unseen, "forget_test": unseen}
    expected["mia_auc"] = CHANCE
    found = _findings(values, expected, sizes or {}, tolerance, ("expected", "was asked", "chance would have it"))
    strange = _strange_before(values, before, forget, sizes or {}, tolerance)
    if strange is not None:
        return _told(found, Verdict(UNDECIDED, strange))
    known = gaps(values, expected).keys() & {"visual forget_train", "visual forget_test", "mia_auc"}
    if known:
        return _told(found, Verdict(PASSED, "forgets what was asked and keeps the rest"))
    return _told(found, Verdict(UNDECIDED, "keeps the rest; only unseen items can tell whether it forgets"))


def _strange_before(
    values: Mapping[str, Any], before: Mapping[str, Any], forget: str, sizes: Mapping[str, int], tolerance: float
) -> str | None:
    """Why figures of the model before leave nothing to say of what was forgotten; None if they do."""
    after, own = values.get("visual") or {}, before.get("visual") or {}
    kept, was = after.get("retain_train"), own.get("retain_train")
    if kept is not None and was is not None and kept > 2 * was:
        return (
            f"visual accuracy on the retain set was {_short(was)} before and is {_short(kept)}: look at whether the "
            "heads of the model are given what they take"
        )
    known = own.get("forget_train")
    if forget != "class" or known is None:
        return None
    if 100 * known > max(tolerance, _two_errors(known, 0.0, sizes.get("forget_train"))):
        return None
    return f"there was nothing to forget: visual accuracy on the forget set was {_short(known)} before"


def with_lost_places(verdict: Verdict, kept: float, least: float) -> Verdict:
    """The verdict on a model whose embeddings of the retain set are no longer where they were."""
    lost = f"loses the retained data: its visual embeddings correlate {_short(kept)} with those before"
    said = [] if verdict.kind in (PASSED, UNDECIDED) else [verdict.text]
    return Verdict(CATASTROPHIC, "; ".join([f"{lost}, expected at least {_short(least)}", *said]))


def _findings(
    values: Mapping[str, Any],
    gold: Mapping[str, Any],
    sizes: Mapping[str, int],
    tolerance: float,
    words: tuple[str, str, str],
) -> list[tuple[str, str]]:
    """What is wrong, kind and text, the worst first; kind "passed" for what is only worth saying."""
    check.number("tolerance", tolerance, low=0)
    worst: dict[str, tuple[str, float, str]] = {}  # by what is said of it: the kind, the excess in points, the figure
    for name, gap in gaps(values, gold).items():
        if name == "mia_auc":
            continue
        modality, part = name.split(" ")
        ours, theirs = values[modality][part], gold[modality][part]
        excess = abs(gap) - max(tolerance, _two_errors(ours, theirs, sizes.get(part)))
        if excess <= 0:
            continue
        kind = OVER_GENERALISED
        if part.startswith("retain"):
            said, counts = "loses the retained data", gap < 0
            kind = CATASTROPHIC if -gap >= COLLAPSE else kind
        elif modality == "other":
            said, counts = "loses the other modality", gap < 0
        elif gap < 0:
            said, counts = f"forgets more than {words[1]}", True
        else:
            said, counts, kind = "still knows what it should forget", True, INEFFECTIVE
        figure = f"{HEADS[modality]} on {SETS[part]} is {_short(ours)}, {words[0]} {_short(theirs)}"
        if counts and excess > worst.get(said, (kind, 0.0, ""))[1]:
            worst[said] = kind, excess, figure
    found = [(kind, excess, f"{said}: {figure}") for said, (kind, excess, figure) in worst.items()]
    found += _membership(values.get("mia_auc"), gold.get("mia_auc"), sizes, tolerance, words)
    found.sort(key=lambda finding: (finding[0] != CATASTROPHIC, finding[0] == PASSED, -finding[1]))
    return [(kind, text) for kind, _, text in found]


def _membership(
    ours: float | None,
    theirs: float | None,
    sizes: Mapping[str, int],
    tolerance: float,
    words: tuple[str, str, str],
) -> list[tuple[str, float, str]]:
    """Whether the attack tells forgotten items from unseen ones better or worse than it should."""
    if ours is None or theirs is None:
        return []
    members, unseen = sizes.get("forget_train"), sizes.get("forget_test") or sizes.get("retain_test")
    error = math.sqrt((members + unseen + 1) / (6 * members * unseen)) if members and unseen else 0.0
    excess = 100 * abs(ours - theirs) - max(tolerance, 200 * error)
    if excess <= 0:
        return []
    easier = abs(ours - CHANCE) > abs(theirs - CHANCE)
    kind = PASSED if not easier else INEFFECTIVE if ours > CHANCE else OVER_GENERALISED
    said = f"{'easier' if easier else 'harder'} to tell from unseen items than {words[2]}"
    return [(kind, excess, f"{said}: membership AUC is {_short(ours)}, {words[0]} {_short(theirs)}")]


def _two_errors(ours: float, theirs: float, items: int | None) -> float:
    """Two standard errors of the difference of two shares of so many items each, in points."""
    if not items:
        return 0.0
    shares = [(share * items + 1) / (items + 2) for share in (ours, theirs)]
    return 200 * math.sqrt(sum(share * (1 - share) / (items + 2) for share in shares))


def _told(found: list[tuple[str, str]], otherwise: Verdict) -> Verdict:
    texts = [text for _, text in found]
    if not found or found[0][0] == PASSED:
        return Verdict(otherwise.kind, "; ".join([otherwise.text, *texts]))
    return Verdict(found[0][0], "; ".join(texts))


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")
