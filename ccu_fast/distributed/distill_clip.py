"""DistillClipLoss: the loss of CLIP and distillation from a teacher, with open_clip's signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.distributed.agreement import agree, like
from ccu_fast.distributed.losses import global_value
from ccu_fast.distributed.open_clip import ITS_OWN_PAIRS, ClipLoss, SumGradient, check_pairs, mean, renamed
from ccu_fast.distributed.ranks import offsets
from ccu_fast.losses import formulas
from ccu_fast.losses.distillation import unit_teacher
from ccu_fast.losses.formulas import Side, Taught
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.normalize import normalize_pair


class DistillClipLoss(ClipLoss):
    """The loss of CLIP beside distillation from a teacher, with the constructor and forward of open_clip's class::

        logits = logit_scale * image_features @ text_features.T
        taught = dist_logit_scale * dist_image_features @ dist_text_features.T
        target = torch.arange(len(logits))
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        distill = (cross_entropy(logits, taught.softmax(1)) + cross_entropy(logits.T, taught.T.softmax(1))) / 2

    Both come from one pass over the student's logits, and no logits are stored; :func:`ccu_fast.distill` says what
    digits the second keeps. The teacher gets no gradient. On several processes it is as :class:`ClipLoss`: values and
    the gradients of the student are open_clip's, with the same exception for the scale.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as of :class:`ClipLoss`.
        normalize: make the features, the teacher's too, unit vectors before they are gathered.
        backend, workspace: see :func:`ccu_fast.reduce_similarity`.

    Raises:
        ValueError: a rank outside the world, use_horovod=True; in forward, a world size other than the group's.
        RuntimeError: in forward, when world_size > 1 and no group is initialised.

    Source: that of :func:`ccu_fast.distill`; open_clip's class of this name.

    >>> x = torch.eye(4)
    >>> ccu_fast.DistillClipLoss()(x, x, 2.0, x, x, 2.0)
    (tensor(0.3408), tensor(0.9183))
    """

    _show = ("local_loss", "gather_with_grad", "rank", "world_size", "normalize", "backend", "workspace")

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        normalize: bool = False,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        own: dict[str, Any] = {"normalize": normalize, "backend": backend, "workspace": workspace}
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **own)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses, in a dictionary under "contrastive_loss" and "distill_loss" if ``output_dict``.

        Args:
            image_features, text_features, logit_scale: the student's, as of :meth:`ClipLoss.forward`.
            dist_image_features, dist_text_features: ``[N, Dt]``, the teacher's; of any width and one float dtype.
            dist_logit_scale: number or one-element tensor, already exponentiated.
            output_dict: return a dictionary.

        Returns:
            Two fp32 scalars. open_clip's own are in the dtype of the logits.
        """
        teacher = dist_image_features, dist_text_features
        options: dict[str, Any] = {"scale": logit_scale, "teacher": teacher, "teacher_scale": dist_logit_scale}
        options |= {"normalize": self.normalize, "backend": self.backend, "workspace": self.workspace}
        if self.normalize:
            options["teacher"] = unit_teacher(teacher, self.backend)
        try:
            contrastive, distilled = self._both(image_features, text_features, options)
        except (TypeError, ValueError) as error:
            raise renamed(error) from error
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distilled}
        return contrastive, distilled

    def _both(self, images: Tensor, texts: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.world_size == 1:  # of several every one has to hear of it
            for name, features in (("x", images), ("y", texts)):
                check.tensor(name, features, ndim=2)
            check.shape("y", texts, images.shape)
            sides = formulas.distill(reduce_similarity, images, texts, **options)
            return _averages(sides)
        if self.local_loss and not self.gather_with_grad:
            return _averages(self._own_rows(images, texts, options))
        ranks = self._ranks()
        factor = self.world_size if self.gather_with_grad else 1
        if not self.local_loss and isinstance(options["scale"], Tensor):
            options["scale"] = SumGradient.apply(options["scale"], ranks, factor)
        sides = formulas.distill(ITS_OWN_PAIRS, images, texts, **options)
        if self.local_loss:
            return _averages(sides)
        contrast, distilled = zip(*sides, strict=True)
        return global_value(ranks, contrast, "mean", factor=factor), global_value(
            ranks, distilled, "mean", factor=factor
        )

    def _own_rows(self, images: Tensor, texts: Tensor, options: dict[str, Any]) -> list[Taught]:
        """Both sides as rows of this rank, because no gradient may come from another; all features travel."""
        ranks = self._ranks()
        teacher = options.pop("teacher")

        def prepare() -> tuple[tuple[Tensor, Tensor], list[int]]:
            check_pairs(images, texts)
            for place, features in enumerate(teacher):
                check.tensor(f"teacher[{place}]", features, ndim=2)
                check.same(f"teacher[{place}]", features, "x", images, dtype=False)
                check.shape(f"teacher[{place}]", features, (len(images), teacher[0].shape[-1]))
            check.same("teacher[1]", teacher[1], "teacher[0]", teacher[0])
            pair = images, texts
            if options.pop("normalize"):
                pair = normalize_pair(images, texts, self.backend)
            outline = f"teacher {teacher[0].shape[-1]} {teacher[0].dtype}"
            return pair, [len(images), len(texts), *like(images, outline)]

        (images, texts), sizes = agree(ranks, prepare, images, equal=False)
        every_image, every_text, every_taught_image, every_taught_text = (
            torch.cat(ranks.gather(own.detach(), sizes.x)) for own in (images, texts, *teacher)
        )
        places = torch.arange(len(every_text), device=images.device)
        options |= {"row_ids": places[offsets(sizes.x)[self.rank] :][: len(images)], "col_ids": places}
        sides = []
        for own, others, taught in (
            (images, every_text, (teacher[0], every_taught_text)),
            (texts, every_image, (teacher[1], every_taught_image)),
        ):
            options |= {"symmetric": False, "teacher": taught}
            sides += formulas.distill(reduce_similarity, own, others, **options)
        return sides


def _averages(sides: list[Taught]) -> tuple[Tensor, Tensor]:
    """Of the two sides, for both losses."""

    def of(both: list[Side]) -> Tensor:
        return (mean(both[0].values()) + mean(both[1].values())) / 2

    return of([side.contrast for side in sides]), of([side.distilled for side in sides])
