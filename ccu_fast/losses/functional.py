"""The contrastive losses of one process: :mod:`ccu_fast.losses.formulas` over :func:`ccu_fast.reduce_similarity`."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.losses import formulas
from ccu_fast.losses.formulas import INVERSE_KINDS
from ccu_fast.ops.backend import KERNEL_DTYPES, autocast_dtype, choose, fp32_precision
from ccu_fast.ops.reduce_similarity import operator
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.small_info_nce.api import small_info_nce

REDUCTIONS = ("mean", "sum", "none")
# What every loss passes on to the reduction.
SIMILARITY = (
    "row_labels",
    "col_labels",
    "row_ids",
    "col_ids",
    "paired",
    "normalize",
    "backend",
    "workspace",
    "nan_policy",
)

F = TypeVar("F", bound=Callable[..., Any])


def arguments(*passed_on: str) -> Callable[[F], F]:
    """Name the argument where a loss, which takes ``**``, is called with an unknown keyword or a scale by position.

    Args:
        passed_on: the keywords that ``**`` stands for.
    """

    def decorate(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        by_place = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        own = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]
        known = dict.fromkeys([*own, *passed_on])

        @functools.wraps(function)
        def named(*args: Any, **keywords: Any) -> Any:
            if len(args) > by_place:
                value = args[by_place]
                shown = value if isinstance(value, int | float) else type(value).__name__
                raise TypeError(f"scale: expected by keyword (scale = 1 / temperature), got {shown} by position")
            for name in keywords:
                if name not in known:
                    likely = "scale (1 / temperature)" if name == "temperature" else _likely(name, known)
                    raise TypeError(f"{name}: expected {likely}, got an unknown keyword")
            return function(*args, **keywords)

        return cast(F, named)

    return decorate


def _likely(name: str, known: Iterable[str]) -> str:
    return " or ".join(difflib.get_close_matches(name, known) or known)


@arguments(*SIMILARITY)
def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    symmetric: bool = True,
    reduction: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Contrast every pair with all others: InfoNCE, and CLIP's loss when symmetric::

        logits = scale * x @ y.mT + bias
        target = torch.arange(len(x))
        loss = F.cross_entropy(logits, target)
        if symmetric:
            loss = (loss + F.cross_entropy(logits.mT, target)) / 2

    With ids the positives of a row are all columns of its id (their mean logit is the target), and rows without a
    positive do not count.

    Args:
        x: ``[..., N, D]`` fp32, fp16 or bf16; usually unit vectors.
        y: ``[..., M, D]``; leading dimensions broadcast, one loss for each bank.
        scale: number or one-element tensor; 1 / temperature.
        bias: number or one-element tensor, added to the logits.
        symmetric: average the losses over rows and over columns.
        reduction: "mean" or "sum" over the items, or "none".
        **similarity: row_ids, col_ids, row_labels and col_labels (only negative ones matter here), paired,
            normalize, backend, workspace, nan_policy: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 ``[...]`` (one value per bank), or ``[..., N]`` for reduction="none".

    Raises:
        ValueError: N ≠ M without ids, or reduction="none" of a symmetric loss with N ≠ M.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4; Radford et al. 2021 (arXiv 2103.00020), fig. 3.

    >>> x = torch.eye(4)
    >>> ccu_fast.info_nce(x, x, scale=2.0)  # log(e² + 3) − 2
    tensor(0.3408)
    """
    check.one_of("reduction", reduction, REDUCTIONS)
    if bias is None and reduction != "none":
        loss = at_once(x, y, scale, similarity, symmetric=symmetric, mean=reduction == "mean")
        if loss is not None:
            return loss
    _require_positives(x, y, similarity)
    sides = formulas.info_nce(reduce_similarity, x, y, scale=scale, bias=bias, symmetric=symmetric, **similarity)
    return formulas.average([_reduce(side, reduction) for side in sides])


@arguments("bias", *SIMILARITY)
def inverse_info_nce(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    kind: str = "bounded",
    reduction: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Push the rows of x away from what they should no longer match::

        S = scale * x @ y.mT
        "bounded":      mean_i( logsumexp(S[i, all]) - logsumexp(S[i, OTHER]) )      # = -log(1 - p_positive) >= 0
        "contrastive":  mean_i( logsumexp(S[i, SAME]) - mean(S[i, OTHER]) )
        "ascent":       -info_nce(x, y, symmetric=False)

    The gradient of "bounded" on a positive is its own softmax probability, so it fades once the row is forgotten;
    "ascent" has no floor. Without labels the positives of "bounded" are SELF alone; "contrastive" needs labels.

    Args:
        x: ``[..., N, D]``, the items to forget.
        y: ``[..., M, D]``, the keys; join several banks with torch.cat.
        scale: number or one-element tensor; 1 / temperature.
        kind: "bounded", "contrastive" or "ascent".
        reduction: "mean" or "sum" over the rows, or "none". Rows that have no positive or no OTHER (for
            "contrastive": no SAME or no OTHER) contribute 0 and do not count in the mean.
        **similarity: bias, row_labels, col_labels, row_ids, col_ids, paired, normalize, backend, workspace,
            nan_policy: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 ``[...]``, or ``[..., N]`` for reduction="none".

    Raises:
        ValueError: unknown kind or reduction; kind="contrastive" without labels; nothing that says what is positive.

    Source: "bounded" is this project's definition for CCU (arXiv 2509.23895 publishes no formula); "contrastive" is
    Contrastive Unlearning, Lee et al. 2024 (arXiv 2401.10458), eq. 1; "ascent" is the negated InfoNCE.

    >>> x = torch.eye(4)
    >>> ccu_fast.inverse_info_nce(x, x, scale=2.0)  # log((e² + 3) / 3)
    tensor(1.2421)
    """
    check.one_of("kind", kind, INVERSE_KINDS)
    check.one_of("reduction", reduction, REDUCTIONS)
    if kind != "contrastive":
        _require_positives(x, y, similarity, labels=kind == "bounded")
    return _reduce(formulas.inverse_info_nce(reduce_similarity, x, y, scale=scale, kind=kind, **similarity), reduction)


@arguments("bias", *SIMILARITY)
def sup_con(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    row_labels: Tensor,
    col_labels: Tensor | None = None,
    reduction: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Draw items of one label together: the supervised contrastive loss, in its "outside" form::

        S = scale * x @ y.mT, the pair (i, i) left out
        mean_i( logsumexp(S[i, SAME or OTHER]) - mean(S[i, SAME]) )

    For the usual one-bank form pass ``sup_con(z, z, ...)``. Rows without a positive contribute 0 and do not count.

    Args:
        x: ``[..., N, D]``; y: ``[..., M, D]``.
        scale: number or one-element tensor; 1 / temperature.
        row_labels: int64 ``[..., N]``; col_labels: int64 ``[..., M]``, by default the row labels.
        reduction: "mean" or "sum" over the rows, or "none".
        **similarity: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 ``[...]``, or ``[..., N]`` for reduction="none".

    Raises:
        TypeError, ValueError: unknown reduction, no labels, labels of the wrong length.

    Source: Khosla et al. 2020 (arXiv 2004.11362), eq. 2.

    >>> z = torch.eye(4)
    >>> ccu_fast.sup_con(z, z, scale=2.0, row_labels=torch.tensor([0, 0, 1, 1]))  # log(3)
    tensor(1.0986)
    """
    check.one_of("reduction", reduction, REDUCTIONS)
    side = formulas.sup_con(
        reduce_similarity, x, y, scale=scale, row_labels=row_labels, col_labels=col_labels, **similarity
    )
    return _reduce(side, reduction)


@arguments(*SIMILARITY)
def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    reduction: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Decide for every pair whether it belongs together: the sigmoid loss of SigLIP::

        logits = scale * x @ y.mT + bias
        sign = 2 * torch.eye(N) - 1
        -F.logsigmoid(sign * logits).sum() / N

    Args:
        x: ``[..., N, D]``; y: ``[..., M, D]``.
        scale, bias: numbers or one-element tensors (gradient flows).
        reduction: "mean" (the sum over all pairs divided by N, rows with a negative label included), "sum", or "none"
            (``[..., N]``).
        **similarity: row_ids, col_ids (equal ids are positives), paired (False: every pair is a negative), normalize,
            backend, workspace, nan_policy: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 ``[...]``, or ``[..., N]`` for reduction="none".

    Raises:
        ValueError: N ≠ M without ids or paired=False, unknown reduction.

    Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1.

    >>> x = torch.eye(4)
    >>> ccu_fast.sigmoid_loss(x, x, scale=2.0)  # softplus(−2) + 3 softplus(0)
    tensor(2.2064)
    """
    check.one_of("reduction", reduction, REDUCTIONS)
    _require_positives(x, y, similarity, negatives_only=True)
    return _reduce(formulas.sigmoid_loss(reduce_similarity, x, y, scale=scale, bias=bias, **similarity), reduction)


def at_once(
    x: Any, y: Any, scale: Any, options: dict[str, Any], *, symmetric: bool = True, mean: bool = True
) -> Tensor | None:
    """:func:`info_nce` of a small batch, by one operator; None where there is none for it."""
    backend = served_by(x, y, options)
    if backend is None:
        return None
    return small_info_nce(x, y, scale, symmetric=symmetric, mean=mean, backend=backend)


def served_by(x: Any, y: Any, options: dict[str, Any]) -> str | None:
    """The backend that has one operator for a call of :func:`info_nce`; None: the general way, which also checks.

    Two matrices of one shape and dtype without keys; on a GPU in half precision.
    """
    if not check.at_hand(x, y) or x.ndim != 2 or x.shape != y.shape:  # a graph must not depend on the size
        return None
    dtype, device = x.dtype, x.device
    if dtype != y.dtype or device != y.device or (options and any(map(_asks_for_more, options.items()))):
        return None
    items, dim = x.shape
    if not 0 < items * items <= operator.SMALL_PAIRS or dim == 0 or dtype not in KERNEL_DTYPES:
        return None
    cast = autocast_dtype(device.type)
    if cast not in (None, dtype) and not (dtype == torch.float32 and cast in operator.HALF):
        return None
    backend = choose(options.get("backend", "auto"), "reduce_similarity", device, dtype)
    if backend == "native":  # which rounds as autocast does, but not as the other setting does
        return None if cast is None and dtype == torch.float32 and fp32_precision("cpu") == "medium" else backend
    half = backend == "triton" and dtype in operator.HALF and dim <= operator.SMALL_DIM and cast in (None, dtype)
    return backend if half else None


def _asks_for_more(option: tuple[str, Any]) -> bool:
    name, value = option
    return not (value is None or name == "backend" or (name == "normalize" and value is False))


def _require_positives(
    x: Tensor, y: Tensor, similarity: dict[str, Any], *, labels: bool = False, negatives_only: bool = False
) -> None:
    """Without ids (or labels, where they make positives) only a paired problem says which items belong together."""
    if not all(isinstance(t, Tensor) and not t.is_nested and t.ndim >= 2 for t in (x, y)):
        return  # reduce_similarity says what is wrong
    if similarity.get("row_ids") is not None or (labels and similarity.get("row_labels") is not None):
        return
    keys = "row_ids and col_ids or row_labels and col_labels" if labels else "row_ids and col_ids"
    if similarity.get("paired") is False:
        if not negatives_only:
            raise ValueError(f"paired: expected True or {keys}, got False")
    elif x.shape[-2] != y.shape[-2]:
        raise ValueError(f"y: expected {x.shape[-2]} rows (those of x) or {keys}, got {y.shape[-2]} rows")


def _reduce(side: formulas.Side, reduction: str) -> Tensor:
    """Mean over the items that count; without any the result is 0, not NaN."""
    values = side.values()
    if reduction == "none":
        return values
    total = values.sum(-1)
    return total if reduction == "sum" else total / side.divisor()
