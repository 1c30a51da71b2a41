"""ClipLoss and SigLipLoss: the losses of CLIP and SigLIP behind open_clip's signatures, on one process or several."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ccu_fast import check
from ccu_fast.losses import info_nce, sigmoid_loss
from ccu_fast.similarity import normalize_pair

SIGLIP_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """The loss of CLIP behind the constructor and forward of open_clip's class of this name::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        target = torch.arange(len(logits))
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    On several processes the features of all ranks are gathered; every rank must hold the same number of pairs.

    Args:
        local_loss: a rank computes the loss of its own rows and columns only, not of the global batch.
        gather_with_grad: gradients flow back to the ranks the features came from. Without it a rank's features get
            gradients from its own loss alone.
        cache_labels: accepted for the signature; there are no labels to cache.
        rank: index of this process, in [0, world_size).
        world_size: number of processes; more than 1 needs an initialised ``torch.distributed`` default group.
        use_horovod: must be False.
        normalize: make the features unit vectors first, before they are gathered.
        backend: see :func:`ccu_fast.reduce_similarity`.
        workspace: bytes of memory the loss may use beyond that of its inputs; see there.

    Raises:
        ValueError: a rank outside the world, use_horovod=True; in forward, a world size other than the group's.
        RuntimeError: in forward, when world_size > 1 and no group is initialised.

    Source: Radford et al. 2021 (arXiv 2103.00020), fig. 3.
    """

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
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False (only torch.distributed is supported), got True")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank, self.world_size = _place(rank, world_size)
        self.use_horovod = use_horovod
        self.normalize = check.boolean("normalize", normalize)
        self.backend = backend
        self.workspace = workspace

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, in a dictionary under "contrastive_loss" if ``output_dict``.

        Args:
            image_features: ``[N, D]`` fp32, fp16 or bf16; unit vectors, unless normalize=True.
            text_features: ``[N, D]``, dtype and device of the image features.
            logit_scale: number or one-element tensor, already exponentiated.
            logit_bias: number or one-element tensor added to the logits.
            output_dict: return a dictionary.

        Returns:
            fp32 scalar. open_clip's own is in the dtype of the logits.
        """
        if self.normalize:
            image_features, text_features = normalize_pair(image_features, text_features, self.backend)
        options = _options(self, logit_scale, logit_bias)
        if self.world_size == 1:
            loss = info_nce(image_features, text_features, **options)
        else:
            images = self._gather("image_features", image_features)
            texts = self._gather("text_features", text_features)
            if self.local_loss:
                options.update(_global_ids(image_features, self.rank, self.world_size), symmetric=False)
                loss = (info_nce(image_features, texts, **options) + info_nce(text_features, images, **options)) / 2
            else:
                loss = info_nce(images, texts, **options)
        return {"contrastive_loss": loss} if output_dict else loss

    def _gather(self, name: str, shard: Tensor) -> Tensor:
        check.tensor(name, shard, ndim=2)
        if self.gather_with_grad:
            return _gather(shard, self.world_size)
        everything = _gather(shard.detach(), self.world_size)
        if self.local_loss:
            return everything
        # The own shard stays in the graph, as the loss of the global batch has no other way to it.
        start = self.rank * len(shard)
        return torch.cat([everything[:start], shard, everything[start + len(shard) :]])

    def extra_repr(self) -> str:
        return _repr(self, "local_loss", "gather_with_grad", "rank", "world_size", "normalize", "backend", "workspace")


class SigLipLoss(nn.Module):
    """The loss of SigLIP behind the constructor and forward of open_clip's class of this name::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        sign = 2 * torch.eye(N) - 1
        -F.logsigmoid(sign * logits).sum() / N

    On several processes a rank computes the loss of its own images against the texts of all ranks, divided by its own
    number of images; gradients flow back to the ranks the texts came from. Every rank must hold the same number.

    Args:
        cache_labels: accepted for the signature; there are no labels to cache.
        rank: index of this process, in [0, world_size).
        world_size: number of processes; more than 1 needs an initialised ``torch.distributed`` default group.
        dist_impl: None, "bidir", "shift", "reduce" or "gather", open_clip's ways to exchange the texts. All give the
            same numbers; this class gathers the texts once whichever is named.
        normalize: make the features unit vectors first, before they are gathered.
        backend: see :func:`ccu_fast.reduce_similarity`.
        workspace: bytes of memory the loss may use beyond that of its inputs; see there.

    Raises:
        ValueError: a rank outside the world, an unknown dist_impl; in forward, a world size other than the group's.
        RuntimeError: in forward, when world_size > 1 and no group is initialised.

    Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1.
    """

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
        super().__init__()
        self.cache_labels = cache_labels
        self.rank, self.world_size = _place(rank, world_size)
        self.dist_impl = None if dist_impl is None else check.one_of("dist_impl", dist_impl, SIGLIP_EXCHANGES)
        self.normalize = check.boolean("normalize", normalize)
        self.backend = backend
        self.workspace = workspace

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, in a dictionary under "contrastive_loss" if ``output_dict``.

        Args:
            image_features: ``[N, D]`` fp32, fp16 or bf16; unit vectors, unless normalize=True.
            text_features: ``[N, D]``, dtype and device of the image features.
            logit_scale: number or one-element tensor, already exponentiated.
            logit_bias: number or one-element tensor added to the logits, or None.
            output_dict: return a dictionary.

        Returns:
            fp32 scalar. open_clip's own is in the dtype of the logits.
        """
        if self.normalize:
            image_features, text_features = normalize_pair(image_features, text_features, self.backend)
        options = _options(self, logit_scale, logit_bias)
        texts = text_features
        if self.world_size > 1:
            texts = _gather(check.tensor("text_features", text_features, ndim=2), self.world_size)
            options.update(_global_ids(image_features, self.rank, self.world_size))
        loss = sigmoid_loss(image_features, texts, **options)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return _repr(self, "rank", "world_size", "dist_impl", "normalize", "backend", "workspace")


class _GatherShards(torch.autograd.Function):
    """Every rank's shard in one tensor. The gradient of a shard is the sum of what all ranks' losses give it."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, world_size: int) -> Tensor:
        ctx.shape = shard.shape
        everything = shard.new_empty(world_size * shard.shape[0], *shard.shape[1:])
        dist.all_gather_into_tensor(everything, shard.contiguous())
        return everything

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if dist.get_backend() == dist.Backend.NCCL:
            own = grad.new_empty(ctx.shape)
            dist.reduce_scatter_tensor(own, grad.contiguous())
            return own, None
        # Other backends do not reliably have a reduce-scatter.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.shape[0]
        return grad[start : start + ctx.shape[0]], None


def _gather(shard: Tensor, world_size: int) -> Tensor:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"world_size: expected an initialised torch.distributed group for {world_size}, got none")
    if dist.get_world_size() != world_size:
        raise ValueError(f"world_size: expected {dist.get_world_size()} (that of the group), got {world_size}")
    gathered: Tensor = _GatherShards.apply(shard, world_size)
    return gathered


def _options(module: ClipLoss | SigLipLoss, scale: float | Tensor, bias: float | Tensor | None) -> dict[str, Any]:
    """What both losses hand to the function that computes them."""
    return {"scale": scale, "bias": bias, "backend": module.backend, "workspace": module.workspace}


def _global_ids(features: Tensor, rank: int, world_size: int) -> dict[str, Tensor]:
    """Row i of this rank is item rank·N + i of the gathered columns."""
    ids = torch.arange(world_size * len(features), device=features.device)
    return {"row_ids": ids[rank * len(features) :][: len(features)], "col_ids": ids}


def _place(rank: int, world_size: int) -> tuple[int, int]:
    world_size = check.integer("world_size", world_size, low=1)
    return check.integer("rank", rank, low=0, high=world_size - 1), world_size


def _repr(module: nn.Module, *names: str) -> str:
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)
