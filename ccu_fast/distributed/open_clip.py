"""ClipLoss and SigLipLoss: the losses of CLIP and SigLIP with open_clip's signatures, on one process or several."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.distributed.agreement import agree, like
from ccu_fast.distributed.losses import global_value, info_nce_sides
from ccu_fast.distributed.ranks import Ranks, offsets
from ccu_fast.distributed.similarity import reduce_similarity
from ccu_fast.losses import formulas
from ccu_fast.losses.contrast import Contrast
from ccu_fast.losses.functional import at_once, info_nce, sigmoid_loss
from ccu_fast.losses.variant import POSITIVES, as_labels, name_ids
from ccu_fast.ops.l2_normalize.api import l2_normalize
from ccu_fast.ops.reduce_similarity.normalize import normalize_pair

# open_clip's pairs are those of each rank: other numbers of texts than of images would be paired with another rank's.
ITS_OWN_PAIRS = partial(reduce_similarity, alike=True)

# The arguments of forward, by their names in the functions that it calls.
_NAMES = {"x": "image_features", "y": "text_features", "scale": "logit_scale", "bias": "logit_bias"}
_NAMES |= {"row_ids": "ids", "col_ids": "ids", "row_labels": "ids", "col_labels": "ids"}
_NAMES |= {"teacher_scale": "dist_logit_scale"}
_WORDS = re.compile(rf"\b({'|'.join(_NAMES)})\b")

_TEACHER = {"teacher[0]": "dist_image_features", "teacher[1]": "dist_text_features"}

SIGLIP_EXCHANGES = ("bidir", "shift", "reduce", "gather")


def check_pairs(images: Tensor, texts: Tensor) -> None:
    """Both ``[B, D]``, of one dtype and device."""
    for name, features in (("x", images), ("y", texts)):
        check.tensor(name, features, ndim=2)
    check.same("y", texts, "x", images)
    check.shape("y", texts, images.shape)


def renamed(error: Exception) -> Exception:
    """The error of a function behind forward, by the names of forward's arguments."""
    said = str(error).replace(" or row_ids and col_ids", "")  # which forward does not take
    for name, theirs in _TEACHER.items():
        said = said.replace(name, theirs)
    return type(error)(_WORDS.sub(lambda word: _NAMES[word[0]], said))


class _OpenClipLoss(nn.Module):
    """The options that both losses have; :class:`ClipLoss` describes them."""

    _show: tuple[str, ...]

    def __init__(
        self, cache_labels: bool, rank: int, world_size: int, normalize: bool, backend: str, workspace: int | None
    ) -> None:
        super().__init__()
        self.cache_labels = check.boolean("cache_labels", cache_labels)
        self.world_size = check.integer("world_size", world_size, low=1)
        self.rank = check.integer("rank", rank, low=0, high=world_size - 1)
        self.normalize = check.boolean("normalize", normalize)
        self.backend = backend
        self.workspace = workspace

    def _called(
        self,
        images: Tensor,
        texts: Tensor,
        scale: float | Tensor,
        bias: float | Tensor | None,
        output_dict: bool,
        more: dict[str, Any],
    ) -> Tensor | dict[str, Tensor]:
        """What ``forward`` returns; errors name its arguments and not those of the functions behind it."""
        try:
            loss = self._at_once(images, texts, scale) if bias is None and not more else None
            if loss is None:
                if self.world_size == 1:  # of several every one has to hear of it
                    for name, features in (("x", images), ("y", texts)):
                        check.tensor(name, features, ndim=2)
                options: dict[str, Any] = {"scale": scale, "bias": bias, "normalize": self.normalize}
                options |= {"backend": self.backend, "workspace": self.workspace, **more}
                loss = self._of_all(images, texts, options)
        except (TypeError, ValueError) as error:
            raise renamed(error) from error
        return {"contrastive_loss": loss} if output_dict else loss

    def _at_once(self, images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor | None:
        """The loss of a small batch, to which checks and options would add a tenth; None: :meth:`_of_all` has it."""
        return None

    def _of_all(self, images: Tensor, texts: Tensor, options: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def _ranks(self) -> Ranks:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"world_size: expected an initialised torch.distributed group for {self.world_size}, got none"
            )
        if dist.get_world_size() != self.world_size:
            raise ValueError(f"world_size: expected {dist.get_world_size()} (that of the group), got {self.world_size}")
        return Ranks()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._show)


class ClipLoss(_OpenClipLoss):
    """The loss of CLIP, with the constructor and forward of open_clip's class of this name::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        target = torch.arange(len(logits))
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    Values and feature gradients on every rank are open_clip's. So are the gradients of scale and bias, with one
    exception: with ``local_loss`` and ``gather_with_grad`` a rank's share differs, but the sum over the ranks is
    open_clip's, and so is what DistributedDataParallel makes of it. Ranks may hold different numbers of pairs (a last
    batch), which open_clip's class does not take; a few numbers are exchanged for that before the features.

    Only the texts travel, and a rank multiplies its own images with them, once (:mod:`ccu_fast.distributed`): half of
    open_clip's traffic and GEMMs. With ``local_loss`` and without ``gather_with_grad`` images travel too, because then
    no gradient may come from another rank.

    Args:
        local_loss: a rank computes the loss of its own rows and columns only, not of the global batch.
        gather_with_grad: gradients flow back to the ranks the features came from. Without it a rank's features get
            gradients from its own loss alone.
        cache_labels: accepted for the signature; there are no labels to cache.
        rank: index of this process, in [0, world_size).
        world_size: number of processes; more than 1 needs an initialised ``torch.distributed`` default group.
        use_horovod: must be False.
        positives: "mean", "lse" or "own": what pairs of one id are for each other, as of :func:`ccu_fast.info_nce`.
        normalize: make the features unit vectors before they are gathered.
        backend, workspace: see :func:`ccu_fast.reduce_similarity`.

    Raises:
        ValueError: a rank outside the world, use_horovod=True; in forward, a world size other than the group's.
        RuntimeError: in forward, when world_size > 1 and no group is initialised.

    Source: Radford et al. 2021 (arXiv 2103.00020), fig. 3.

    >>> ccu_fast.ClipLoss()(torch.eye(4), torch.eye(4), logit_scale=2.0)
    tensor(0.3408)
    """

    _show: tuple[str, ...] = (
        *("local_loss", "gather_with_grad", "rank", "world_size", "positives"),
        *("normalize", "backend", "workspace"),
    )

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        positives: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        if use_horovod:
            raise ValueError("use_horovod: expected False (only torch.distributed is supported), got True")
        super().__init__(cache_labels, rank, world_size, normalize, backend, workspace)
        self.positives = check.one_of("positives", positives, POSITIVES)
        self.local_loss = check.boolean("local_loss", local_loss)
        self.gather_with_grad = check.boolean("gather_with_grad", gather_with_grad)
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,
        negatives: Tensor | None = None,
        hard_negatives: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, in a dictionary under "contrastive_loss" if ``output_dict``.

        Args:
            image_features: ``[N, D]`` fp32, fp16 or bf16; unit vectors, unless normalize=True.
            text_features: ``[N, D]``, dtype and device of the image features.
            logit_scale: number or one-element tensor, already exponentiated.
            logit_bias: number or one-element tensor added to the logits.
            output_dict: return a dictionary.
            ids: int64 ``[N]``: pairs of one id, such as those of one caption, belong together, also on several ranks;
                ``positives`` of the constructor says how.
            negatives: ``[K, D]`` more texts, which belong to no image: NegCLIP's captions with swapped words.
            hard_negatives: ``[N, K, D]`` texts that are compared with their own image alone.

        Returns:
            fp32 scalar. open_clip's own is in the dtype of the logits.
        """
        more: dict[str, Any] = {}
        if ids is not None:
            more |= {"ids": ids, "positives": self.positives}
        if negatives is not None:
            more["negatives"] = negatives
        if hard_negatives is not None:
            more["hard_negatives"] = hard_negatives
        return self._called(image_features, text_features, logit_scale, logit_bias, output_dict, more)

    def _at_once(self, images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor | None:
        if self.world_size > 1 or self.normalize or self.workspace is not None:
            return None
        return at_once(images, texts, scale, {"backend": self.backend})

    def _of_all(self, images: Tensor, texts: Tensor, options: dict[str, Any]) -> Tensor:
        if self.world_size == 1:
            return info_nce(images, texts, **options)
        if self.local_loss and not self.gather_with_grad:
            return self._own_rows_alone(images, texts, options)
        return self._texts_travel(images, texts, options)

    def _texts_travel(self, images: Tensor, texts: Tensor, options: dict[str, Any]) -> Tensor:
        """Half of the GEMMs and of the traffic: columns are reduced where their images are and sent to their texts."""
        ranks = self._ranks()
        if not self.local_loss:
            # open_clip computes the global loss on every rank, with the whole gradient of scale and bias.
            factor = self.world_size if self.gather_with_grad else 1
            for name in ("scale", "bias"):
                if isinstance(options[name], Tensor):
                    options[name] = SumGradient.apply(options[name], ranks, factor)
        sides = info_nce_sides(ITS_OWN_PAIRS, images, texts, **options)
        if self.local_loss:
            return (mean(sides[0].raw) + mean(sides[1].raw)) / 2
        return global_value(ranks, sides, "mean", factor=factor)

    def _own_rows_alone(self, images: Tensor, texts: Tensor, options: dict[str, Any]) -> Tensor:
        """No gradient reaches another rank's features, so neither side can be computed elsewhere: both travel."""
        ranks = self._ranks()
        ids = options.pop("ids", None)
        own = {"hard_negatives": options.pop("hard_negatives", None)}

        def prepare() -> tuple[tuple[Tensor, Tensor], list[int]]:
            check_pairs(images, texts)
            if options.get("negatives") is not None:
                raise ValueError("negatives: expected None with local_loss without gather_with_grad, got a tensor")
            scalars = {"scale": options["scale"], "bias": options["bias"]}
            asked = Contrast(images, texts, symmetric=False, ids=ids, positives=self.positives, **scalars, **own)
            given = f"{asked.outline()}, ids {ids is not None}"
            outline = given if ids is not None or own["hard_negatives"] is not None else ""
            pair = images, texts
            if options.pop("normalize"):
                pair = normalize_pair(images, texts, self.backend)
                if own["hard_negatives"] is not None:
                    own["hard_negatives"] = l2_normalize(own["hard_negatives"], backend=self.backend)
            return pair, [len(images), len(texts), *like(images, outline)]

        (images, texts), sizes = agree(ranks, prepare, images, equal=False)
        every_image, every_text = (torch.cat(ranks.gather(own.detach(), sizes.x)) for own in (images, texts))
        places = torch.arange(len(every_text), device=images.device)
        options |= {"row_ids": places[offsets(sizes.x)[self.rank] :][: len(images)], "col_ids": places}
        if ids is not None:
            what, named = ("labels", as_labels(ids)) if self.positives == "own" else ("ids", ids.long())
            options |= {f"row_{what}": named, f"col_{what}": torch.cat(ranks.gather(named, sizes.x))}
        options["symmetric"] = False
        return (info_nce(images, every_text, **options, **own) + info_nce(texts, every_image, **options)) / 2


class SigLipLoss(_OpenClipLoss):
    """The loss of SigLIP, with the constructor and forward of open_clip's class of this name::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        sign = 2 * torch.eye(N) - 1
        -F.logsigmoid(sign * logits).sum() / N

    On several processes a rank computes the loss of its own images against the texts of all ranks, divided by its own
    number of images, which may differ from rank to rank; gradients flow back to the ranks the texts came from.

    Args:
        cache_labels, rank, world_size, normalize, backend, workspace: as of :class:`ClipLoss`.
        dist_impl: None, "bidir", "shift", "reduce" or "gather", open_clip's ways to exchange the texts. All give the
            same numbers; this class chooses by size between gathering the texts and a ring, whichever is named.

    Raises:
        ValueError: a rank outside the world, an unknown dist_impl; in forward, a world size other than the group's.
        RuntimeError: in forward, when world_size > 1 and no group is initialised.

    Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1.

    >>> ccu_fast.SigLipLoss()(torch.eye(4), torch.eye(4), logit_scale=2.0, logit_bias=None)
    tensor(2.2064)
    """

    _show = ("rank", "world_size", "dist_impl", "normalize", "backend", "workspace")

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        normalize: bool = False,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size, normalize, backend, workspace)
        self.dist_impl = None if dist_impl is None else check.one_of("dist_impl", dist_impl, SIGLIP_EXCHANGES)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss; arguments and result as of :meth:`ClipLoss.forward`. Every pair of one id is a positive."""
        return self._called(
            image_features, text_features, logit_scale, logit_bias, output_dict, {} if ids is None else {"ids": ids}
        )

    def _of_all(self, images: Tensor, texts: Tensor, options: dict[str, Any]) -> Tensor:
        if self.world_size == 1:
            return sigmoid_loss(images, texts, **options)
        self._ranks()
        name_ids(options)
        return mean(formulas.sigmoid_loss(ITS_OWN_PAIRS, images, texts, **options).raw)


def mean(values: Tensor) -> Tensor:
    """0 for a rank without pairs."""
    return values.sum() / max(len(values), 1)


class SumGradient(torch.autograd.Function):
    """A number that every rank has; its gradient is the sum of the ranks' shares, each ``factor`` times too large."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks, factor: int) -> Tensor:
        ctx.ranks, ctx.factor = ranks, factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.total(grad) / ctx.factor, None, None
