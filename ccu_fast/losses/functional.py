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
from ccu_fast.losses.contrast import Contrast
from ccu_fast.losses.formulas import INVERSE_KINDS, POSITIVES
from ccu_fast.losses.variant import PREFIXED, VARIANT, VARIED, name_ids, of_prefixes, without_defaults
from ccu_fast.ops.backend import KERNEL_DTYPES, autocast_dtype, choose, fp32_precision
from ccu_fast.ops.reduce_similarity import operator
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.normalize import normalize_pair
from ccu_fast.ops.small_info_nce.api import small_info_nce

REDUCTIONS = ("mean", "sum", "none")
# What every loss passes on to the reduction.
SIMILARITY = (
    *("row_labels", "col_labels", "row_ids", "col_ids", "paired", "row_limits", "col_limits", "guide"),
    *("normalize", "backend", "workspace", "nan_policy"),
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
                shown = value if isinstance(value, (int, float)) else type(value).__name__
                raise TypeError(f"scale: expected by keyword (scale = 1 / temperature), got {shown} by position")
            for name in keywords:
                if name not in known:
                    likely = "scale (1 / temperature)" if name in ("tau", "temperature") else _likely(name, known)
                    raise TypeError(f"{name}: expected {likely}, got an unknown keyword")
            return function(*args, **keywords)

        return cast(F, named)

    return decorate


def _likely(name: str, known: Iterable[str]) -> str:
    return " or ".join(difflib.get_close_matches(name, known) or known)


@arguments("ids", *VARIANT, *SIMILARITY)
def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    symmetric: bool = True,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """Contrast every pair with all others: InfoNCE, and CLIP's loss when symmetric::

        logits = scale * x @ y.mT + bias
        target = torch.arange(len(x))
        loss = F.cross_entropy(logits, target)
        if symmetric:
            loss = (loss + F.cross_entropy(logits.mT, target)) / 2

    So a row comes to log(1 + exp(rest − own)), where own is the logit of its positive and rest the log-sum-exp of its
    negatives. The options below change either.

    Args:
        x: ``[..., N, D]`` fp32, fp16 or bf16; usually unit vectors.
        y: ``[..., M, D]``; leading dimensions broadcast, one loss for each bank.
        scale: number or one-element tensor; 1 / temperature.
        bias: number or one-element tensor, added to the logits.
        symmetric: average the losses over rows and over columns.
        reduction: "mean" or "sum" over the items, or "none".
        ids: int64 ``[N]`` or ``[..., N]``, for row_ids and col_ids alike: items of one id, such as pictures with the
            same caption, are positives of each other.
        positives: what several positives of a row come to. "mean" draws each of them near: lse(all) − mean(own), as in
            Khosla et al. 2020, eq. 2, and in UniCL. "lse": it suffices that one is near; minus the log of the
            probability of all together, which is eq. 3 there but for the constant log of their number. "own": the row's
            own pair (by place, or by row_ids) is the positive, and the others of its ids= or row_labels= are left out.
            (If the texts of one id are identical to the last bit, "mean" equals InfoNCE without ids, also in the
            gradients of the towers.)
        negatives: ``[..., K, D]`` more keys, which are negatives of every row of x (DPR, NegCLIP, a queue of MoCo).
        negative_ids: int64 ``[K]``: which of them are no negatives of the rows with the same id.
        hard_negatives: ``[..., N, K, D]``, K negatives of each row of x alone.
        in_batch: False: ``negatives`` and ``hard_negatives`` are the only negatives, and only rows count.
        joint: in place of ``symmetric`` one softmax for each pair i, over its own logit and the negatives of these
            directions: "x_to_y" (x_i and every y_j), "y_to_x" (y_i and every x_j), "x_to_x", "y_to_y". GTE has all four
            (Li et al. 2023, arXiv 2308.03281), SimCLR's halves have "x_to_y" and "x_to_x". The positive is in it once.
        margin, threshold: leave out as false negatives what resembles an item more than its positive does by more than
            ``margin``, or by more than ``threshold`` at all. Similarities are those of x and y before scale and bias; a
            row's positives are never left out. Qwen3 Embedding has margin 0.1 (arXiv 2506.05176, eq. 1).
        relative: the margin is a share of the positive's similarity.
        guide: features ``[..., N, G]`` and ``[..., M, G]`` of another model for x and y and, if given, for negatives
            and hard_negatives: similarities are compared by it (GISTEmbed, Solatorio 2024, arXiv 2402.16829; there
            margin is 0, in its later form negative). It gets no gradient.
        decoupled: the positive is not among what it is compared with: rest − own (DCL, Yeh et al. 2022, arXiv
            2110.06848, eq. 6). Rows without a negative do not count.
        smoothing: in [0, 1], the share of the target that is spread over all logits of a row (``label_smoothing``).
        debias: τ in [0, 1), or a tensor ``[N]`` of them, without a gradient: the share of false negatives that is
            assumed and subtracted: rest = log max((Σ exp(negatives) − τ n exp(own)) / (1 − τ), n exp(bias − |scale|)),
            of n negatives (Chuang et al. 2020, arXiv 2007.00224, eq. 8).
        hardness: β ≥ 0, weighs negatives by exp(β · logit), with mean weight 1 (Robinson et al. 2021, arXiv
            2010.04592, eq. 4). A second pass over the similarities.
        focal: γ ≥ 0: every row times (1 − p)^γ, p the probability of its positive (Lin et al. 2017, arXiv 1708.02002).
        prefixes: ascending numbers of dimensions: the sum of the losses of x[..., :d], y[..., :d] and of so much of all
            negatives (Matryoshka, Kusupati et al. 2022, arXiv 2205.13147, eq. 1), each made a unit vector where
            ``normalize``. See :func:`ccu_fast.reduce_prefixes` for what that costs.
        prefix_weights: a number for each of them. Default: 1.
        **options: row_ids, col_ids, row_labels and col_labels (only negative ones matter here), paired,
            row_limits, col_limits, normalize, backend, workspace, nan_policy: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 ``[...]`` (one value per bank), or ``[..., N]`` for reduction="none". Rows without a positive do not count.

    Raises:
        TypeError, ValueError: N ≠ M without ids, reduction="none" of a symmetric loss with N ≠ M, an option outside its
            range or beside one that it does not go with.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4; Radford et al. 2021 (arXiv 2103.00020), fig. 3.

    >>> x = torch.eye(4)
    >>> ccu_fast.info_nce(x, x, scale=2.0)  # log(e² + 3) − 2
    tensor(0.3408)
    >>> ccu_fast.info_nce(x, x, scale=2.0, ids=torch.tensor([0, 0, 1, 1]))  # the mean of two is log(e² + 3) − 1
    tensor(1.3408)
    >>> ccu_fast.info_nce(x, x, scale=2.0, negatives=-x, symmetric=False)  # log(e² + 6 + e⁻²) − 2
    tensor(0.6045)
    """
    check.one_of("reduction", reduction, REDUCTIONS)
    if symmetric is not True and symmetric is not False:  # a call would be felt by a small batch
        check.boolean("symmetric", symmetric)
    if options and any(name in VARIED for name in options):
        options = without_defaults(options)
    if bias is None and reduction != "none":
        loss = at_once(x, y, scale, options, symmetric=symmetric, mean=reduction == "mean")
        if loss is not None:
            return loss
    _require_positives(x, y, options)
    pair: dict[str, Any] = {"scale": scale, "bias": bias, "symmetric": symmetric}
    if not options or all(name not in VARIED for name in options):
        sides = formulas.info_nce(reduce_similarity, x, y, **pair, **options)
    else:
        sides = Contrast(x, y, **pair, **options).sides(reduce_similarity, reduce_similarity)
    return formulas.average([reduced(side, reduction) for side in sides])


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
    return reduced(formulas.inverse_info_nce(reduce_similarity, x, y, scale=scale, kind=kind, **similarity), reduction)


@arguments("bias", *SIMILARITY)
def sup_con(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    row_labels: Tensor,
    col_labels: Tensor | None = None,
    positives: str = "mean",
    reduction: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Draw items of one label together: the supervised contrastive loss, in its "outside" form::

        S = scale * x @ y.mT, the pair (i, i) left out
        mean_i( logsumexp(S[i, SAME or OTHER]) - mean(S[i, SAME]) )          # positives="mean"
        mean_i( logsumexp(S[i, SAME or OTHER]) - logsumexp(S[i, SAME]) )     # positives="lse"

    For the usual one-bank form pass ``sup_con(z, z, ...)``. Rows without a positive contribute 0 and do not count.

    Args:
        x, y: ``[..., N, D]`` and ``[..., M, D]``.
        scale: number or one-element tensor; 1 / temperature.
        row_labels, col_labels: int64 ``[..., N]`` and ``[..., M]``, the latter by default the row labels.
        positives: "mean" draws every positive near; "lse": it suffices that one is near, the "inside" form but for the
            constant log of their number.
        reduction: "mean" or "sum" over the rows, or "none".
        **similarity: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 ``[...]``, or ``[..., N]`` for reduction="none".

    Raises:
        TypeError, ValueError: unknown reduction or positives, no labels, labels of the wrong length.

    Source: Khosla et al. 2020 (arXiv 2004.11362), eq. 2, and eq. 3 for "lse".

    >>> z = torch.eye(4)
    >>> ccu_fast.sup_con(z, z, scale=2.0, row_labels=torch.tensor([0, 0, 1, 1]))  # log(3)
    tensor(1.0986)
    """
    check.one_of("reduction", reduction, REDUCTIONS)
    check.one_of("positives", positives, POSITIVES)
    side = formulas.sup_con(
        *(reduce_similarity, x, y),
        scale=scale,
        row_labels=row_labels,
        col_labels=col_labels,
        positives=positives,
        **similarity,
    )
    return reduced(side, reduction)


@arguments("ids", *SIMILARITY)
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
        x, y: ``[..., N, D]`` and ``[..., M, D]``.
        scale, bias: numbers or one-element tensors (gradient flows).
        reduction: "mean" (the sum over all pairs divided by N, rows with a negative label included), "sum", or "none"
            (``[..., N]``).
        ids: int64 ``[N]`` or ``[..., N]``, for row_ids and col_ids alike: items of one id are positives of each other.
        **similarity: row_ids, col_ids (equal ids are positives), paired (False: every pair is a negative), row_limits,
            normalize, backend, workspace, nan_policy: see :func:`ccu_fast.reduce_similarity`.

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
    if isinstance(similarity.get("ids"), Tensor) and isinstance(x, Tensor) and x.ndim >= 2:
        check.per_row("ids", similarity["ids"], x.shape[:-2], x.shape[-2])
    name_ids(similarity)
    _require_positives(x, y, similarity, negatives_only=True)
    return reduced(formulas.sigmoid_loss(reduce_similarity, x, y, scale=scale, bias=bias, **similarity), reduction)


def at_once(
    x: Any, y: Any, scale: Any, options: dict[str, Any], *, symmetric: bool = True, mean: bool = True
) -> Tensor | None:
    """:func:`info_nce` of a small batch by one operator, or one for each prefix; None where there is none for it."""
    backend = served_by(x, y, options)
    if backend is None:
        return None

    def loss(u: Tensor, v: Tensor) -> Tensor:
        if options.get("normalize"):
            u, v = normalize_pair(u, v, backend)
        return small_info_nce(u, v, scale, symmetric=symmetric, mean=mean, backend=backend)

    return of_prefixes(loss, x, y, options) if "prefixes" in options else loss(x, y)


def served_by(x: Any, y: Any, options: dict[str, Any]) -> str | None:
    """The backend that has one operator for a call of :func:`info_nce`; None: the general way, which also checks.

    Two matrices of one shape and dtype without keys; on a GPU in half precision. With prefixes fewer than 256 pairs of
    fp32 on a CPU.
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
    if options and any(name in PREFIXED for name in options):
        few = items * items < operator.FEW_PAIRS and dtype == torch.float32 and cast is None
        if not few or backend != "native" or "prefixes" not in options:
            return None
    if backend == "native":  # which rounds as autocast does, but not as the other setting does
        in_bf16 = torch.bfloat16 in (dtype, cast)
        return None if not in_bf16 and fp32_precision("cpu") == "medium" else backend
    half = backend == "triton" and dtype in operator.HALF and dim <= operator.SMALL_DIM and cast in (None, dtype)
    return backend if half else None


def _asks_for_more(option: tuple[str, Any]) -> bool:
    name, value = option
    if name == "normalize":
        return not isinstance(value, bool)
    if name == "prefixes":
        return not isinstance(value, (tuple, list)) or not value
    return not (name in ("backend", "prefix_weights") or value is None)


def _require_positives(
    x: Tensor, y: Tensor, similarity: dict[str, Any], *, labels: bool = False, negatives_only: bool = False
) -> None:
    """Without ids (or labels, where they make positives) only a paired problem says which items belong together."""
    if not all(isinstance(t, Tensor) and not t.is_nested and t.ndim >= 2 for t in (x, y)):
        return  # reduce_similarity says what is wrong
    if similarity.get("row_ids") is not None or (labels and similarity.get("row_labels") is not None):
        return
    if similarity.get("ids") is not None and similarity.get("positives") != "own":
        return
    keys = "row_ids and col_ids or row_labels and col_labels" if labels else "row_ids and col_ids"
    if similarity.get("paired") is False:
        if not negatives_only:
            raise ValueError(f"paired: expected True or {keys}, got False")
    elif x.shape[-2] != y.shape[-2]:
        raise ValueError(f"y: expected {x.shape[-2]} rows (those of x) or {keys}, got {y.shape[-2]} rows")


def reduced(side: formulas.Side, reduction: str) -> Tensor:
    """Mean over the items that count; without any the result is 0, not NaN."""
    values = side.values()
    if reduction == "none":
        return values
    total = values.sum(-1)
    return total if reduction == "sum" else total / side.divisor()
