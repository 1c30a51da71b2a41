"""MMUnlearner: ascent on the forget set and descent on the retain set, on the weights that little else depends on.

    F = mean over batches of (grad of the batch's loss)²
    keep = F of the retain set and of the other modality alone of all items, where that reaches the weight;
           F of the retain set elsewhere
    mask = F_forget / keep ≥ 1
    loss = −CE(forget batch) in one step, then task(retain batch) in |retain| / |forget| steps, all under the mask

Made for language models that see. Source: Huo et al. 2025, MMUnlearner (arXiv 2502.11051), and its released code, which
the formulas here follow. There a weight of the vision tower or of the projector is compared with the retain set alone,
one of the language model with the retain set and the texts of the full set together; F is taken in batches of 4 and in
batches of 128 here; AdamW at 1e-5, batches of 4, one pass, the gradient clipped at norm 1 before the mask, as here.

Changed: in the released code descents are not masked, and neither are weights that the chosen mask leaves out, of which
those of the vision tower are an example in its published commands; here the mask holds in every step and for every
weight, so that the rest stays as it was to the last bit. Changed for two modalities: the text is the other modality,
its knowledge the cross-entropy of its head on both sets; whether a weight is one of the visual side alone is told by
whether that loss depends on it. CE(forget batch) and F_forget are of the heads that see the visual modality.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.importance import exceeds, shuffled, sum_of_squares, trainable_copy
from ccu_fast.unlearn.loop import Batch, Move, Step, Update
from ccu_fast.unlearn.model import TwoModalityModel, heads, loss_on

MAX_NORM = 1.0


def mm_unlearner(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """The method; its other half is :func:`masked`."""
    turn = 1 + max(1, len(retain) // len(forget))

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        if batch.step % turn == 0 and batch.step + 1 < batch.steps:
            return -loss_on(model, batch.forget, visual_only=True)
        return loss_on(model, batch.retain)

    return step


def masked(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Update:
    """The clipping and the mask of all gradients.

    Raises:
        ValueError: the model has no head for the other modality or the items have no labels, so that what the other
            modality knows cannot be told from what both know.
    """
    if "other" not in heads(frozen) or not forget.labelled:
        raise ValueError(
            "model: expected a head for the other modality and items with labels, which say what that modality knows "
            "by itself, got a model or data without"
        )
    mask = visual_mask(frozen, forget, retain, seed)

    def update(model: TwoModalityModel, batch: Batch, move: Move, memory: dict[str, Tensor]) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(mask[name])
        move()

    return update


def visual_mask(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> dict[str, Tensor]:
    """The weights that may change, a bool tensor for the name of each parameter."""
    model = trainable_copy(frozen)
    gone, kept = shuffled(forget, seed), shuffled(retain, seed)
    of_gone = sum_of_squares(model, partial(loss_on, visual_only=True), gone)
    of_kept = sum_of_squares(model, loss_on, kept)
    texts = sum_of_squares(model, _other_loss, [*gone, *kept])
    keep = {
        name: (total + texts[name]) / (len(gone) + 2 * len(kept)) if name in texts else total / len(kept)
        for name, total in of_kept.items()
    }
    return exceeds({name: total / len(gone) for name, total in of_gone.items()}, keep, model)


def _other_loss(model: TwoModalityModel, data: PairedData) -> Tensor:
    return F.cross_entropy(model.classify_other(model.embed_other(data.other)), data.labels)
