"""NegGrad+ whose update is kept out of the directions that retained items mostly use in each layer, of both modalities.

    C = mean of x xᵀ over what the layer is given for retained items;   W₀ = the original's weights, W = W₀ + ΔW
    U = the eigenvectors of C with an eigenvalue above 0.1 · trace C
    ΔW ← ΔW (I − U Uᵀ) after every step
    loss = NegGrad+

The part of a retained input that lies in U meets the weights it always met. Source of the projection: Liu et al. 2025,
Continual Multimodal Contrastive Learning (arXiv 2503.14963), where new pairs of modalities are learned without loss of
earlier ones, and its released code, which the formulas here follow. There each modality has one linear layer on the
features of a frozen encoder, and the gradient of its weight is projected from both sides,

    G ← G − P′ G P,   P = U Uᵀ of the layer's inputs,   P′ = U′ U′ᵀ of the other modality's outputs,

so that the similarities of earlier pairs stay. U has the eigenvectors with an eigenvalue above 0.1, U′ those above 0;
AdamW follows, at 1e-4 or 1e-3.

Changed: the aim is to unlearn, so the loss is NegGrad+ (:mod:`ccu_fast.unlearn.baselines.plain_losses`), and the
earlier pairs are the retained ones. Not one layer is projected but every linear and ordinary convolutional one, of the
towers, of what both share and of the heads; a layer that both modalities go through has the inputs of both in C. From
the right alone: P′ is the identity wherever the outputs have a part in every direction, and inside a network there is
no other modality's output that a layer's is multiplied by. How large features are differs between layers, so 0.1 is a
share of the trace, which for unit vectors is the same. The bias, free there, is here the weight of a constant input. It
is the update that is projected: Adam's step does not lie where its gradient lies. All other parameters, and layers that
share one or are not wholly trainable, stay as they are.

On small networks 0.1 leaves little more than the mean input in U. The lower it is, the better the rest is kept and the
less is forgotten: on held-out digits-halves, seeds 100 and 101, 0.01 leaves three quarters of a class recognised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Batch, Move, Update
from ccu_fast.unlearn.model import TwoModalityModel, embed_both, evaluating, heads, logits_of

LEAST = 0.1  # of the trace
CHUNK = 256


def projected(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Update:
    """The projection, as what is done in every step of NegGrad+.

    Raises:
        ValueError: the model has no layer that could be projected.
    """
    used = used_directions(frozen, retain)
    if not used:
        raise ValueError("model: expected at least one linear or convolutional layer of its own weights, got none")
    before = {name: p.detach() for name, p in frozen.named_parameters()}

    @torch.no_grad()
    def update(model: TwoModalityModel, batch: Batch, move: Move, memory: dict[str, Tensor]) -> None:
        move()
        now = dict(model.named_parameters())
        for layer, directions in used.items():
            names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in now]
            if all(now[name].requires_grad for name in names):
                moved = torch.cat([(now[name] - before[name]).reshape(len(before[name]), -1) for name in names], 1)
                allowed = moved - moved @ directions @ directions.mT
                width = now[names[0]][0].numel()
                for name, part in zip(names, (allowed[:, :width], allowed[:, width:]), strict=False):
                    now.pop(name).copy_(before[name] + part.reshape(before[name].shape))
        for name, parameter in now.items():
            parameter.copy_(before[name])

    return update


def used_directions(model: TwoModalityModel, data: PairedData) -> dict[str, Tensor]:
    """By name of a layer the orthonormal directions ``[inputs, k]`` that its inputs mostly lie in.

    Args:
        model: not changed. Layers that share a parameter with others or are not called by the towers and heads have no
            entry.
        data: the items.

    Returns:
        Eigenvectors of the mean of x xᵀ, see :func:`leading`. The constant input of a bias comes last; the inputs of a
        convolution are its patches.
    """
    module = cast(nn.Module, model)
    owners = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    sums: dict[str, Tensor] = {}
    handles = []
    for name, layer in module.named_modules():
        inputs_of = _inputs_of(layer)
        if inputs_of is not None and all(owners[id(p)] == 1 for p in layer.parameters(recurse=False)):
            handles.append(layer.register_forward_pre_hook(_adder(sums, name, inputs_of)))
    try:
        with evaluating(model):
            for rows in torch.arange(len(data), device=data.labels.device).split(CHUNK):
                visual, other = embed_both(model, data.batch(rows))
                for head in heads(model):
                    logits_of(model, head, visual, other)
    finally:
        for handle in handles:
            handle.remove()
    return {name: leading(total).to(next(iter(module.parameters())).dtype) for name, total in sums.items()}


def leading(covariance: Tensor) -> Tensor:
    """The eigenvectors ``[n, k]`` of a covariance ``[n, n]`` whose eigenvalue is above LEAST of its trace."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, values > LEAST * values.sum()]


def _inputs_of(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """From what the layer is called with to the vectors ``[N, inputs]`` its weight is multiplied by."""
    if isinstance(layer, nn.Linear):
        return lambda x: x.flatten(0, -2)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        size: Any = layer.kernel_size
        if isinstance(layer.padding, str):
            return None
        options: Any = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
        return lambda x: F.unfold(x, size, **options).mT.flatten(0, -2)
    return None


def _adder(sums: dict[str, Tensor], name: str, inputs_of: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def add(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = inputs_of(arguments[0]).double()
        if getattr(layer, "bias", None) is not None:
            x = F.pad(x, (0, 1), value=1.0)
        sums[name] = x.mT @ x + sums.get(name, 0)

    return add
