"""The contrastive losses over a process group: the global batch's value, and each rank's gradients of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.distributed.agreement import agree, like
from ccu_fast.distributed.ranks import Ranks
from ccu_fast.distributed.similarity import reduce_similarity
from ccu_fast.losses import formulas
from ccu_fast.losses.contrast import Contrast
from ccu_fast.losses.distillation import PASSED_ON as DISTILLING
from ccu_fast.losses.distillation import unit_teacher
from ccu_fast.losses.formulas import INVERSE_KINDS, POSITIVES, Side
from ccu_fast.losses.functional import REDUCTIONS, SIMILARITY, arguments
from ccu_fast.losses.variant import VARIANT, VARIED, name_ids, without_defaults

GRADIENTS = ("mean", "sum")
PASSED_ON = (*SIMILARITY, "group", "mode", "equal")

# Only a paired problem says which items belong together without keys.
PAIRS_OR_IDS = partial(reduce_similarity, positives="row_ids and col_ids")
PAIRS_IDS_OR_LABELS = partial(reduce_similarity, positives="row_ids and col_ids or row_labels and col_labels")


@arguments("ids", *VARIANT, *PASSED_ON)
def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    symmetric: bool = True,
    reduction: str = "mean",
    gradients: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Compute :func:`ccu_fast.info_nce` of the batch that lies on all ranks together::

        X, Y = (torch.cat([v of rank 0, v of rank 1, ...]) for v in (x, y))
        loss = ccu_fast.info_nce(X, Y, ...)                                     # the same value on every rank

    Every rank must run backward through it with the same incoming gradient.

    Args:
        x: ``[n, D]``, this rank's items; n may differ from rank to rank.
        y: ``[m, D]``, this rank's; the side that travels.
        scale: number or one-element tensor, the same on every rank; 1 / temperature.
        bias: number or one-element tensor, added to the logits.
        symmetric: average the losses over rows and over columns.
        reduction: "mean" or "sum" over the items of all ranks, or "none": this rank's items.
        gradients: how the ranks' parameter gradients will be put together. "mean": DistributedDataParallel or FSDP
            averages them; each rank's gradient is multiplied by the number of ranks, so that the average is the
            gradient of the loss. "sum": they will be added, and ``x.grad`` is exactly the slice of the one-process
            gradient. Without effect for reduction="none": the gradient is that of the sum of all ranks' values.
        **similarity: ids and the other keywords of :func:`ccu_fast.info_nce`, of this rank's items. ``negatives`` of
            all ranks are negatives of every row; a bank that all ranks hold, such as a gathered
            :class:`ccu_fast.KeyQueue`, is for :func:`ccu_fast.info_nce` on each rank instead. And row_ids, col_ids,
            row_labels, col_labels, paired, row_limits, col_limits, normalize, backend, workspace, nan_policy, group,
            mode, equal: see :func:`ccu_fast.distributed.reduce_similarity`.

    Returns:
        fp32 scalar, or ``[n]`` for reduction="none".

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`ccu_fast.distributed.reduce_similarity`.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4; Radford et al. 2021 (arXiv 2103.00020), fig. 3.

    Example, of one process alone:

    >>> ccu_fast.distributed.info_nce(torch.eye(4), torch.eye(4), scale=2.0)
    tensor(0.3408)
    """
    ending = _heard(x, reduction, gradients, similarity, lambda: check.boolean("symmetric", symmetric))
    reduce = partial(PAIRS_OR_IDS, ending=ending)
    sides = info_nce_sides(reduce, x, y, scale=scale, bias=bias, symmetric=symmetric, **similarity)
    return _finish(sides, reduction, gradients, similarity)


def info_nce_sides(
    reduce: formulas.Reduce, x: Tensor, y: Tensor, *, scale: Any, bias: Any, symmetric: bool = True, **options: Any
) -> list[Side]:
    """InfoNCE, of which every rank hears if one is asked for what cannot be."""
    options = without_defaults(options)
    if all(name not in VARIED for name in options):
        return formulas.info_nce(reduce, x, y, scale=scale, bias=bias, symmetric=symmetric, **options)

    def prepare() -> tuple[Contrast, list[int]]:
        for name, value in (("x", x), ("y", y)):
            check.tensor(name, value, ndim=2)
        contrast = Contrast(x, y, scale=scale, bias=bias, symmetric=symmetric, **options)
        return contrast, [len(x), len(y), *like(x, contrast.outline())]

    ranks = Ranks(options.get("group"))
    contrast, _ = agree(ranks, prepare, x, equal=options.get("equal", False))
    return contrast.sides(reduce, reduce_similarity)


@arguments("bias", *PASSED_ON)
def inverse_info_nce(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    kind: str = "bounded",
    reduction: str = "mean",
    gradients: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Compute :func:`ccu_fast.inverse_info_nce`, which has the formula, of the batch on all ranks together.

    Args: scale and kind as there; x (items to forget), y (keys) and all others as of :func:`info_nce` here.

    Returns: fp32 scalar, or ``[n]`` for reduction="none".

    Raises: what :func:`ccu_fast.inverse_info_nce` and :func:`reduce_similarity` here raise.

    Source: that of :func:`ccu_fast.inverse_info_nce`.

    Example, of one process alone:

    >>> ccu_fast.distributed.inverse_info_nce(torch.eye(4), torch.eye(4), scale=2.0)
    tensor(1.2421)
    """
    ending = _heard(x, reduction, gradients, similarity, lambda: check.one_of("kind", kind, INVERSE_KINDS))
    reduces: dict[str, formulas.Reduce] = {
        "contrastive": reduce_similarity,
        "bounded": PAIRS_IDS_OR_LABELS,
        "ascent": PAIRS_OR_IDS,
    }
    reduce = partial(reduces[kind], ending=ending)
    side = formulas.inverse_info_nce(reduce, x, y, scale=scale, kind=kind, **similarity)
    return _finish([side], reduction, gradients, similarity)


@arguments("bias", *PASSED_ON)
def sup_con(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    row_labels: Tensor,
    col_labels: Tensor | None = None,
    positives: str = "mean",
    reduction: str = "mean",
    gradients: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Compute :func:`ccu_fast.sup_con`, which has the formula, of the batch on all ranks together.

    Args: row_labels int64 ``[n]``, col_labels int64 ``[m]`` and positives as there; all others as of :func:`info_nce`
    here.

    Returns: fp32 scalar, or ``[n]`` for reduction="none".

    Raises: what :func:`ccu_fast.sup_con` and :func:`reduce_similarity` here raise.

    Source: Khosla et al. 2020 (arXiv 2004.11362), eq. 2, and eq. 3 for "lse".

    Example, of one process alone:

    >>> z, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> ccu_fast.distributed.sup_con(z, z, scale=2.0, row_labels=labels)
    tensor(1.0986)
    """
    ending = _heard(x, reduction, gradients, similarity, lambda: check.one_of("positives", positives, POSITIVES))
    side = formulas.sup_con(
        *(partial(reduce_similarity, ending=ending), x, y),
        scale=scale,
        row_labels=row_labels,
        col_labels=col_labels,
        positives=positives,
        **similarity,
    )
    return _finish([side], reduction, gradients, similarity)


@arguments("ids", *PASSED_ON)
def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    reduction: str = "mean",
    gradients: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Compute :func:`ccu_fast.sigmoid_loss`, which has the formula, of the batch on all ranks together.

    Args: reduction as there ("mean" divides by the rows of all ranks); all others as of :func:`info_nce` here.

    Returns: fp32 scalar, or ``[n]`` for reduction="none".

    Raises: what :func:`ccu_fast.sigmoid_loss` and :func:`reduce_similarity` here raise.

    Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1.

    Example, of one process alone:

    >>> ccu_fast.distributed.sigmoid_loss(torch.eye(4), torch.eye(4), scale=2.0)
    tensor(2.2064)
    """
    ending = _heard(x, reduction, gradients, similarity, lambda: name_ids(similarity))
    reduce = partial(reduce_similarity if similarity.get("paired") is False else PAIRS_OR_IDS, ending=ending)
    side = formulas.sigmoid_loss(reduce, x, y, scale=scale, bias=bias, **similarity)
    return _finish([side], reduction, gradients, similarity)


@arguments(*DISTILLING, "group", "mode", "equal")
def distill(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    teacher: tuple[Tensor, Tensor],
    teacher_scale: float | Tensor,
    symmetric: bool = True,
    reduction: str = "mean",
    gradients: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Compute :func:`ccu_fast.distill`, which has the formula, of the batch on all ranks together.

    Args: teacher ``([n, Dt], [m, Dt])``, its features of this rank's items, and teacher_scale as there, the same on
    every rank; all others as of :func:`info_nce` here.

    Returns: fp32 scalar, or ``[n]`` for reduction="none".

    Raises: what :func:`ccu_fast.distill` and :func:`reduce_similarity` here raise.

    Source: that of :func:`ccu_fast.distill`.

    Example, of one process alone:

    >>> x = torch.eye(4)
    >>> ccu_fast.distributed.distill(x, x, scale=2.0, teacher=(x, x), teacher_scale=2.0)
    tensor(0.9183)
    """
    options = {"symmetric": symmetric, "normalize": similarity.get("normalize", False)}
    ending = _heard(x, reduction, gradients, similarity, lambda: [check.boolean(*option) for option in options.items()])
    if options["normalize"]:
        teacher = unit_teacher(teacher, similarity.get("backend"))
    reduce = partial(reduce_similarity, ending=ending)
    taught: dict[str, Any] = {"scale": scale, "teacher": teacher, "teacher_scale": teacher_scale}
    sides = formulas.distill(reduce, x, y, symmetric=symmetric, **taught, **similarity)
    return _finish([side.distilled for side in sides], reduction, gradients, similarity)


def _heard(
    x: Any, reduction: str, gradients: str, similarity: dict[str, Any], more: Callable[[], object]
) -> tuple[int, int]:
    """Check what is needed before the first exchange; what of it has to be the same on every rank, as numbers.

    A rank that refuses its arguments takes part in the exchange that the others are in, which then hear of it.
    """
    try:
        check.one_of("reduction", reduction, REDUCTIONS)
        check.one_of("gradients", gradients, GRADIENTS)
        more()
    except (TypeError, ValueError) as error:
        wrong = error

        def refuse() -> tuple[None, list[int]]:
            raise wrong

        agree(Ranks(similarity.get("group")), refuse, x, equal=similarity.get("equal", False))
    return REDUCTIONS.index(reduction), GRADIENTS.index(gradients)


def _finish(sides: Sequence[Side], reduction: str, gradients: str, similarity: dict[str, Any]) -> Tensor:
    if reduction == "none":
        return formulas.average([side.values() for side in sides])
    ranks = Ranks(similarity.get("group"))
    return global_value(ranks, sides, reduction, factor=ranks.size if gradients == "mean" else 1)


def global_value(ranks: Ranks, sides: Sequence[Side], reduction: str, *, factor: int) -> Tensor:
    """Mean or sum over the items of all ranks, averaged over the sides; the gradient is ``factor`` times it."""
    own = torch.stack([side.values().sum() for side in sides])
    counts = [len(side.raw) if side.counts is None else side.counts.sum() for side in sides]
    items = torch.stack([torch.as_tensor(c, dtype=torch.float64, device=own.device) for c in counts])
    totals, items = ranks.total(torch.stack([own.detach().double(), items]))
    divisor = items.clamp(min=1) * len(sides) if reduction == "mean" else torch.full_like(items, len(sides))
    value = (totals / divisor).sum().to(own.dtype)
    value_here: Tensor = _Share.apply((own.double() / divisor).sum(), value, factor)
    return value_here


class _Share(torch.autograd.Function):
    """The value of the whole, with the gradient of this rank's share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, whole: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.double() * ctx.factor, None, None
