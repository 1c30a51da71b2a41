"""One nn.Module for every loss of the package, with its options fixed and, if wanted, a scale of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.losses.distillation import distill
from ccu_fast.losses.formulas import POSITIVES
from ccu_fast.losses.functional import (
    INVERSE_KINDS,
    REDUCTIONS,
    arguments,
    info_nce,
    inverse_info_nce,
    sigmoid_loss,
    sup_con,
)
from ccu_fast.losses.variant import VARIANT, Variant

OPTIONS = ("learnable", "reduction", "normalize", "backend", "workspace")
# Of what varies InfoNCE, what is no tensor and so can be fixed.
FIXED = tuple(name for name in VARIANT if name not in ("negatives", "negative_ids", "hard_negatives", "guide"))


class _SimilarityLoss(nn.Module):
    """A loss with its options fixed and, if it was given one, a scale of its own; :class:`SupCon` describes them."""

    log_scale: nn.Parameter | None
    bias: nn.Parameter | float | None
    _show: tuple[str, ...] = ("reduction", "normalize", "backend", "workspace")

    @arguments()
    def __init__(
        self,
        *,
        scale: float | None = None,
        learnable: bool = False,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__()
        self.learnable = learnable
        self.reduction = check.one_of("reduction", reduction, REDUCTIONS)
        self.normalize = check.boolean("normalize", normalize)
        self.backend = backend
        self.workspace = workspace
        if isinstance(scale, Tensor):
            raise TypeError("scale: expected a number, with learnable=True to train it, got a tensor")
        if scale is not None:
            scale = check.number("scale", scale)
        if not learnable:
            self._fixed_scale = scale
            self.register_parameter("log_scale", None)
        elif scale is None or scale <= 0:
            raise ValueError(f"scale: expected a positive number for learnable=True, got {scale}")
        else:
            self._fixed_scale = None
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> float | Tensor | None:
        """The module's own scale: a number, exp(log_scale), or None."""
        return self._fixed_scale if self.log_scale is None else self.log_scale.exp()

    def _options(self, scale: float | Tensor | None) -> dict[str, Any]:
        own = self.scale
        if own is None and scale is None:
            raise ValueError("scale: expected a number or tensor because the module was built without one, got None")
        if own is not None and scale is not None:
            raise ValueError("scale: expected None because the module has its own scale, got a value")
        return {
            "scale": scale if own is None else own,
            "reduction": self.reduction,
            "normalize": self.normalize,
            "backend": self.backend,
            "workspace": self.workspace,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in ("scale", "learnable", *self._show))


class InfoNCE(_SimilarityLoss):
    """InfoNCE as a module: :func:`ccu_fast.info_nce`, which has formula and source, with its options fixed.

    Args:
        scale: the inverse temperature, by keyword; None when forward is to be given it.
        symmetric: average the losses over rows and over columns.
        **options: positives, in_batch, joint, margin, relative, threshold, decoupled, smoothing, debias, hardness and
            focal, as of :func:`ccu_fast.info_nce`; learnable, reduction, normalize, backend and workspace, as of
            :class:`SupCon`.

    Raises:
        TypeError, ValueError: as of :func:`ccu_fast.info_nce` and :class:`SupCon`.

    >>> ccu_fast.InfoNCE(scale=2.0)(torch.eye(4), torch.eye(4))
    tensor(0.3408)
    >>> ccu_fast.InfoNCE(scale=2.0, decoupled=True)(torch.eye(4), torch.eye(4))  # log(3) − 2
    tensor(-0.9014)
    """

    _show = ("symmetric", *_SimilarityLoss._show)

    @arguments(*FIXED, *OPTIONS)
    def __init__(self, *, scale: float | None = None, symmetric: bool = True, **options: Any) -> None:
        self.variant = {name: options.pop(name) for name in FIXED if name in options}
        alone = {} if self.variant.get("joint") else {"in_batch": True}  # with what else it goes, only forward knows
        Variant(**{**self.variant, **alone})
        check.boolean("in_batch", self.variant.get("in_batch", True))
        if isinstance(self.variant.get("debias"), Tensor):
            raise TypeError("debias: expected a number, and in forward a tensor, got a tensor")
        super().__init__(scale=scale, **options)
        self.symmetric = check.boolean("symmetric", symmetric)

    def forward(self, x: Tensor, y: Tensor, *, scale: float | Tensor | None = None, **similarity: Any) -> Tensor:
        """``info_nce(x, y)`` with the options of the module.

        Args:
            x: ``[..., N, D]``.
            y: ``[..., M, D]``.
            scale: required when the module has none of its own, refused when it has.
            **similarity: bias, ids, negatives, hard_negatives, guide and the like, and any other value for an option of
                the module: see :func:`ccu_fast.info_nce`.

        Returns:
            fp32 ``[...]``, or ``[..., N]`` for reduction="none".
        """
        return info_nce(x, y, **{"symmetric": self.symmetric, **self._options(scale), **self.variant, **similarity})

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in self.variant.items())])


class InverseInfoNCE(_SimilarityLoss):
    """The inverse of InfoNCE as a module: :func:`ccu_fast.inverse_info_nce`, which has formula and source.

    Its scale is never learned: unlearning would just lower it.

    Args:
        scale: the inverse temperature, by keyword; None when forward is to be given it.
        kind: "bounded", "contrastive" or "ascent".
        **options: reduction, normalize, backend and workspace, as of :class:`SupCon`.

    Raises:
        TypeError, ValueError: as of :class:`SupCon`; an unknown kind, the option learnable.

    >>> ccu_fast.InverseInfoNCE(scale=2.0)(torch.eye(4), torch.eye(4))
    tensor(1.2421)
    """

    _show = ("kind", *_SimilarityLoss._show)

    @arguments(*OPTIONS)
    def __init__(self, *, scale: float | None = None, kind: str = "bounded", **options: Any) -> None:
        if "learnable" in options:
            raise TypeError("learnable: expected no such option for InverseInfoNCE, got one")
        super().__init__(scale=scale, **options)
        self.kind = check.one_of("kind", kind, INVERSE_KINDS)

    def forward(self, x: Tensor, y: Tensor, *, scale: float | Tensor | None = None, **similarity: Any) -> Tensor:
        """``inverse_info_nce(x, y)`` with the options of the module: x is forgotten, y are the keys.

        Args and result as of :meth:`InfoNCE.forward`; see :func:`ccu_fast.inverse_info_nce`.
        """
        return inverse_info_nce(x, y, kind=self.kind, **self._options(scale), **similarity)


class SupCon(_SimilarityLoss):
    """The supervised contrastive loss as a module: :func:`ccu_fast.sup_con`, which has formula and source.

    Args:
        scale: the inverse temperature, by keyword; None when forward is to be given it.
        learnable: hold the scale as the parameter ``log_scale`` (its logarithm, so that it stays positive), which
            starts at ``scale``. CLIP bounds it after each step: ``module.log_scale.data.clamp_(max=math.log(100))``.
        positives: "mean" or "lse", as of :func:`ccu_fast.sup_con`.
        reduction: "mean", "sum" or "none".
        normalize: make the rows of x and y unit vectors first.
        backend, workspace: see :func:`ccu_fast.reduce_similarity`.

    Raises:
        TypeError, ValueError: an option outside its range, a learnable scale that is not positive.

    >>> loss = ccu_fast.SupCon(scale=2.0, learnable=True)
    >>> loss(torch.eye(4), torch.eye(4), torch.tensor([0, 0, 1, 1])).item()
    1.0986...
    """

    _show = ("positives", *_SimilarityLoss._show)

    @arguments(*OPTIONS)
    def __init__(self, *, scale: float | None = None, positives: str = "mean", **options: Any) -> None:
        super().__init__(scale=scale, **options)
        self.positives = check.one_of("positives", positives, POSITIVES)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        row_labels: Tensor,
        col_labels: Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        **similarity: Any,
    ) -> Tensor:
        """``sup_con(x, y)`` with the options of the module.

        Args and result as of :meth:`InfoNCE.forward`, and row_labels int64 ``[..., N]``, col_labels int64
        ``[..., M]``, by default the row labels; see :func:`ccu_fast.sup_con`.
        """
        options: dict[str, Any] = {"positives": self.positives, **self._options(scale), **similarity}
        return sup_con(x, y, row_labels=row_labels, col_labels=col_labels, **options)


class DistillLoss(_SimilarityLoss):
    """Distillation of similarities as a module: :func:`ccu_fast.distill`, which has formula and source.

    Args:
        scale: the student's inverse temperature, by keyword; None when forward is to be given it.
        teacher_scale: the teacher's; None when forward is to be given it. It is never learned.
        symmetric: average the losses over rows and over columns.
        **options: learnable, reduction, normalize, backend and workspace, as of :class:`SupCon`; learnable concerns
            ``scale``, normalize the teacher's rows too.

    Raises:
        TypeError, ValueError: as of :class:`SupCon`.

    >>> x = torch.eye(4)
    >>> ccu_fast.DistillLoss(scale=2.0, teacher_scale=2.0)(x, x, teacher=(x, x))
    tensor(0.9183)
    """

    _show = ("teacher_scale", "symmetric", *_SimilarityLoss._show)

    @arguments(*OPTIONS)
    def __init__(
        self,
        *,
        scale: float | None = None,
        teacher_scale: float | None = None,
        symmetric: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(scale=scale, **options)
        self.teacher_scale = None if teacher_scale is None else check.number("teacher_scale", teacher_scale)
        self.symmetric = check.boolean("symmetric", symmetric)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        teacher: tuple[Tensor, Tensor],
        scale: float | Tensor | None = None,
        teacher_scale: float | Tensor | None = None,
        **similarity: Any,
    ) -> Tensor:
        """``distill(x, y)`` with the options of the module.

        Args and result as of :meth:`InfoNCE.forward`, and teacher, the features of the other model; teacher_scale is
        required when the module has none of its own, refused when it has. See :func:`ccu_fast.distill`.
        """
        if (teacher_scale is None) == (self.teacher_scale is None):
            own, got = ("its own", "a value") if teacher_scale is not None else ("none", "None")
            expected = "None" if teacher_scale is not None else "a number or tensor"
            raise ValueError(f"teacher_scale: expected {expected} because the module has {own}, got {got}")
        options: dict[str, Any] = {"symmetric": self.symmetric, **self._options(scale), **similarity}
        options["teacher_scale"] = self.teacher_scale if teacher_scale is None else teacher_scale
        return distill(x, y, teacher=teacher, **options)


class SigmoidLoss(_SimilarityLoss):
    """The sigmoid loss as a module: :func:`ccu_fast.sigmoid_loss`, which has formula and source.

    Args:
        scale: the inverse temperature; None when forward is to be given it. SigLIP starts at 10.
        bias: added to the logits, None for no bias; learned with the scale. SigLIP starts at −10.
        **options: learnable, reduction, normalize, backend and workspace, as of :class:`SupCon`.

    Raises:
        TypeError, ValueError: as of :class:`SupCon`.

    >>> ccu_fast.SigmoidLoss(scale=2.0)(torch.eye(4), torch.eye(4))
    tensor(2.2064)
    """

    _show = ("bias", *_SimilarityLoss._show)

    @arguments(*OPTIONS)
    def __init__(self, *, scale: float | None = None, bias: float | None = None, **options: Any) -> None:
        super().__init__(scale=scale, **options)
        if bias is not None:
            bias = check.number("bias", bias)
        self.bias = nn.Parameter(torch.tensor(bias)) if self.learnable and bias is not None else bias

    def forward(self, x: Tensor, y: Tensor, *, scale: float | Tensor | None = None, **similarity: Any) -> Tensor:
        """``sigmoid_loss(x, y)`` with the options of the module; ``bias`` takes the place of the module's.

        Args and result as of :meth:`InfoNCE.forward`; see :func:`ccu_fast.sigmoid_loss`.
        """
        return sigmoid_loss(x, y, **{"bias": self.bias, **self._options(scale), **similarity})


def _shown(value: Any) -> str:
    return f"{value.item():.6g}" if isinstance(value, Tensor) else repr(value)
