"""The towers of a ``transformers.CLIPModel``, computed from its modules without the work that nobody reads.

Equal to the library's own forward up to rounding. Three things are left out: the last block at every position but the
one that gives the feature (a twelfth of a tower of twelve blocks, nearly), QuickGELU's own passes over the widest
activation (its two factors go into the products around it, and backward keeps one tensor in place of three), and a
convolution whose patches do not overlap, which is a matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUICK = 1.702  # QuickGELU(x) = x · sigmoid(1.702 x) = silu(1.702 x) / 1.702
_NAMES = ("CLIPEncoderLayer", "CLIPAttention", "CLIPMLP")
_BLOCK = {"self_attn", "layer_norm1", "layer_norm2", "mlp"}
_LEAVES = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d)


def usable(tower: Any, training: bool) -> bool:
    """Whether the modules of a tower are the ones this file knows, and none between them is watched or changed."""
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if not layers or getattr(tower.encoder, "gradient_checkpointing", False):
        return False
    return (
        all(map(_known, layers))
        and not any(_watched(m) for m in tower.modules() if not isinstance(m, _LEAVES))
        and (not training or not any(layer.self_attn.dropout for layer in layers))
    )


def _known(layer: Any) -> bool:
    names = {name for name, _ in layer.named_children()}
    return (
        names == _BLOCK and (type(layer).__name__, type(layer.self_attn).__name__, type(layer.mlp).__name__) == _NAMES
    )


def _watched(module: nn.Module) -> bool:
    """Whether calling it does more than its class says: hooks, or a forward that was put in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def image_feature(model: Any, pixels: Tensor) -> Tensor | None:
    """Features ``[N, D]`` before normalisation; None where only the library's own way serves."""
    tower = model.vision_model
    embed: Any = getattr(tower, "embeddings", None)
    conv = getattr(embed, "patch_embedding", None)
    if not usable(tower, model.training) or not isinstance(conv, nn.Conv2d):
        return None
    size = tower.config.image_size
    if pixels.shape[2:] != (size, size) or conv.bias is not None or conv.kernel_size != conv.stride or _watched(conv):
        return None
    p = conv.kernel_size[0]
    n, channels, cells = len(pixels), pixels.shape[1], size // p
    cut = pixels.to(conv.weight.dtype)[:, :, : cells * p, : cells * p].reshape(n, channels, cells, p, cells, p)
    patches = F.linear(cut.permute(0, 2, 4, 1, 3, 5).reshape(n, cells * cells, -1), conv.weight.flatten(1))
    first = embed.class_embedding.to(patches.dtype).expand(n, 1, -1)
    x = torch.cat([first, patches], 1) + embed.position_embedding(embed.position_ids)
    x = tower.pre_layrnorm(x)
    *blocks, last = tower.encoder.layers
    for layer in blocks:
        x = _block(layer, x)
    return model.visual_projection(tower.post_layernorm(_block(last, x, asked=x[:, :1])[:, 0]))


def text_feature(model: Any, tokens: Tensor, embeddings: Tensor) -> Tensor | None:
    """Features ``[N, D]`` before normalisation, at EOT; None where only the library's own way serves."""
    tower, length = model.text_model, tokens.shape[1]
    eos = getattr(tower, "eos_token_id", None)
    if eos is None or length > tower.config.max_position_embeddings or not usable(tower, model.training):
        return None
    # The library's rule: id 2 stands for old configurations, in which EOT is the largest id of a text.
    ends = tokens.int() if eos == 2 else (tokens == eos).int()
    end = ends.argmax(1)
    x = embeddings + tower.embeddings.position_embedding.weight[:length]
    *blocks, last = tower.encoder.layers
    for layer in blocks:
        x = _block(layer, x, causal=True)
    asked = x[torch.arange(len(x), device=x.device), end][:, None]
    seen = (torch.arange(length, device=x.device) <= end[:, None])[:, None, None]
    return model.text_projection(tower.final_layer_norm(_block(last, x, asked=asked, seen=seen)[:, 0]))


def _block(
    layer: Any, x: Tensor, *, causal: bool = False, asked: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """One pre-norm block at the positions ``asked``, ``[N, Q, W]`` (all: None), which look at ``seen`` of ``x``."""
    attention = layer.self_attn
    h = layer.layer_norm1(x)
    key, value = attention.k_proj(h), attention.v_proj(h)
    if asked is not None:
        x, h = asked, layer.layer_norm1(asked)
    query, key, value = (_split(part, attention.num_heads) for part in (attention.q_proj(h), key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=causal, scale=attention.scale)
    x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return _feed_forward(layer.mlp, layer.layer_norm2(x), x)


def _split(x: Tensor, heads: int) -> Tensor:
    n, length, width = x.shape
    return x.view(n, length, heads, width // heads).transpose(1, 2)


def _feed_forward(mlp: Any, h: Tensor, residual: Tensor) -> Tensor:
    wide, narrow = mlp.fc1, mlp.fc2
    # Where someone watches or has changed a layer (hooks, parametrisations, adapters), it is called as it stands.
    if type(mlp.activation_fn).__name__ != "QuickGELUActivation" or any(
        type(m) is not nn.Linear or _watched(m) for m in (wide, narrow)
    ):
        return residual + narrow(mlp.activation_fn(wide(h)))
    n, length, width = h.shape
    scaled = torch.addmm(wide.bias, h.reshape(-1, width), wide.weight.t(), beta=QUICK, alpha=QUICK)
    y = F.linear(F.silu(scaled), narrow.weight).view(n, length, -1)
    return torch.add(residual + narrow.bias, y, alpha=1 / QUICK)
