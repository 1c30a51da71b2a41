"""The authors' algorithm (Liu et al. 2024) written plainly, as an oracle and as a measure of the work it does.

One function per phase, in plain torch and plain loops, from the paper's Algorithm 1 and a description of the authors'
code. It shares only the model with ccu_fast. It does the work of the original: the image tower runs again for every
candidate, text has all positions, scores are computed on the host, gradients of all weights are computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(model: Any, pixels: Tensor, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of a batch."""
    logits = model.scale * model.encode_image(pixels) @ model.encode_text(tokens, embeddings).T
    target = torch.arange(len(pixels))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def put(tokens: Tensor, triggers: Tensor, context: int, eot: int) -> Tensor:
    """SOT, triggers, caption, EOT, zeros up to the context."""
    out = torch.zeros(len(tokens), context, dtype=torch.int64)
    for i, row in enumerate(tokens.tolist()):
        ids = [row[0], *triggers[i].tolist(), *row[1 : row.index(eot) + 1]]
        out[i, : len(ids)] = torch.tensor(ids)
    return out


def train(model: Any, optimizer: Any, pixels: Tensor, tokens: Tensor) -> None:
    """One surrogate step."""
    optimizer.zero_grad()
    info_nce(model, pixels, tokens).backward()
    optimizer.step()


def search(model: Any, pixels: Tensor, tokens: Tensor, length: int, k: int) -> Tensor:
    """HotFlip triggers of one batch; tokens as :func:`put` gives them, changed in a copy that is returned."""
    tokens = tokens.clone()
    # One gradient for all positions.
    embeddings = model.embedding_matrix[tokens].detach().requires_grad_(True)
    info_nce(model, pixels, tokens, embeddings).backward()
    gradient = embeddings.grad.cpu()
    matrix = model.embedding_matrix.detach().cpu()
    proposals = []
    for position in range(1, length + 1):
        scores = -(gradient[:, position] @ matrix.T)  # the larger, the more the loss falls
        proposals.append(scores.topk(k, dim=1).indices)
    for position in range(1, length + 1):
        kept, best = None, None
        for rank in range(k + 1):
            trial = tokens.clone()
            if rank < k:  # rank k is the word that stands there
                trial[:, position] = proposals[position - 1][:, rank]
            with torch.no_grad():
                loss = info_nce(model, pixels, trial).item()
            if best is None or loss < best:  # on the mean of the batch
                kept, best = trial, loss
        tokens = kept
    return tokens


def perturb(model: Any, images: Tensor, noise: Tensor, step_tokens: list[Tensor], step: float, eps: float) -> Tensor:
    """PGD, one element of ``step_tokens`` a step; noise and images in units of [0, 1]."""
    noisy = (images + noise).clamp(0, 1)
    for tokens in step_tokens:
        leaf = noisy.requires_grad_(True)  # the gradient is by valid pixels, with no clamp in between
        info_nce(model, leaf, tokens).backward()
        noise = (leaf.detach() - step * leaf.grad.sign() - images).clamp(-eps, eps)  # what is stored: not cut
        noisy = (images + noise).clamp(0, 1)
    return noise


def protect(
    model: Any,
    images: Tensor,
    tokens: Tensor,
    first: int,
    length: int,
    settings: Any,
    rng: torch.Generator,
    *,
    context: int,
    eot: int,
) -> tuple[Tensor, Tensor]:
    """Rounds of the three phases; images in [0, 1] of the model's dtype. Noise in [0, 1] and triggers."""
    rows, size = len(images), settings.batch
    noise = torch.zeros_like(images)
    triggers = torch.full((rows, length), first)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, settings.beta2),
    )
    order: list[Tensor] = []
    for round_index in range(settings.rounds):
        model.train()
        for _ in range(settings.surrogate_steps):
            if not order:
                shuffled = torch.randperm(rows, generator=rng)
                order = [shuffled[i : i + size] for i in range(0, rows - size + 1, size)]  # drop_last
            batch = order.pop(0)
            shown = (images[batch] + noise[batch]).clamp(0, 1)
            train(model, optimizer, shown, put(tokens[batch], triggers[batch], context, eot))
        model.eval()
        for start in range(0, rows - size + 1, size):  # drop_last
            batch = torch.arange(start, start + size)
            if round_index < settings.search_rounds and length:
                text = put(tokens[batch], triggers[batch], context, eot)
                shown = (images[batch] + noise[batch]).clamp(0, 1)
                found = search(model, shown, text, length, settings.candidates)
                triggers[batch] = found[:, 1 : length + 1]
            step_tokens = []
            for _ in range(settings.pgd_steps):
                permuted = batch[torch.randperm(size, generator=rng)]  # captions move, triggers stay
                step_tokens.append(put(tokens[permuted], triggers[batch], context, eot))
            noise[batch] = perturb(
                model, images[batch], noise[batch], step_tokens, settings.step / 255, settings.eps / 255
            )
    return noise, triggers
