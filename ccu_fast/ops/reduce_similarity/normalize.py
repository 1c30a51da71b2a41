"""Both sides of a similarity as unit vectors."""

from __future__ import annotations

from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.l2_normalize.api import l2_normalize
from ccu_fast.ops.reduce_similarity.problem import without_ignored


def normalize_pair(
    x: Tensor, y: Tensor, backend: str, row_labels: Tensor | None = None, col_labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale the rows of both to unit length; a bank that is compared with itself is scaled once.

    Ignored rows become zero before: their gradient is 0 although they may hold NaN. Labels are checked later.
    """
    check.tensor("x", x)
    check.tensor("y", y)
    col_labels = row_labels if col_labels is None else col_labels
    same = y is x and col_labels is row_labels
    unit = l2_normalize(without_ignored(x, row_labels), backend=backend)
    return unit, unit if same else l2_normalize(without_ignored(y, col_labels), backend=backend)
