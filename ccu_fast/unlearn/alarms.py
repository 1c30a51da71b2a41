"""What makes a run's model unfit for use, by name, and what to try next."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

KEPT = 0.7  # correlation of retained embeddings with those before: less than half their variance is left below it


@dataclass(frozen=True)
class Alarm:
    """A way to fail that nobody should overlook.

    Attributes:
        name: "not forgotten", "retain collapsed" or "nothing trainable matches".
        advice: what to try next, an imperative clause.
    """

    name: str
    advice: str

    def because(self, why: str) -> dict[str, str]:
        """As results.json holds it: "name", "advice", "why" and, of all three, the sentences "text"."""
        text = f"{self.name}: {why}. This model is not to be used as it is. Next: {self.advice}."
        return {**asdict(self), "why": why, "text": text}


NOT_FORGOTTEN = Alarm(
    "not forgotten",
    "give it more steps or a higher learning_rate, or train more parameters (trainable), and start anew (--fresh)",
)
COLLAPSED = Alarm(
    "retain collapsed",
    "give it a lower learning_rate or fewer steps, or train fewer parameters (trainable), and start anew (--fresh)",
)
NOTHING_TRAINABLE = Alarm("nothing trainable matches", "choose trainable among the model's own names of parameters")
# By what the verdict calls it (:mod:`ccu_fast.unlearn.audit.verdict`).
BY_VERDICT = {"catastrophic": COLLAPSED, "ineffective": NOT_FORGOTTEN}


class NotFinite(FloatingPointError):
    """A run that the steps it took have driven to infinity."""

    alarm = COLLAPSED


class NothingTrainable(ValueError):
    """Settings that leave nothing to train."""

    alarm = NOTHING_TRAINABLE


def alarm_of(verdict: Any) -> dict[str, str] | None:
    """The alarm that a :class:`ccu_fast.unlearn.audit.Verdict` raises, as results.json holds it; None for none."""
    alarm = BY_VERDICT.get(verdict.kind)
    return None if alarm is None else alarm.because(verdict.text)


def kept_places(before: Tensor, after: Tensor) -> float | None:
    """How far embeddings have stayed where they were: the correlation of their deviations from the mean::

        x, y = before - before.mean(0), after - after.mean(0)
        (x * y).sum() / (x.norm() * y.norm())

    Heads that a large step has scrambled may still tell well-separated classes apart; whatever else uses the
    embeddings, such as the other modality or an index of them, finds nothing any more.

    Args:
        before, after: embeddings ``[N, D]`` of the same items.

    Returns:
        In [-1, 1]; 0 where ``after`` is not finite or all in one place. None where ``before`` are all in one place.
    """
    x, y = ((z.double() - z.double().mean(0)) for z in (before, after))
    if float(x.norm()) <= 1e-6 * len(x) ** 0.5:
        return None
    found = float((x * y).sum() / (x.norm() * y.norm()))
    return found if math.isfinite(found) else 0.0
