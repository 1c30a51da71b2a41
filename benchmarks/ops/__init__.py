"""The operations that are measured."""

from benchmarks.ops import clip_loss, labelled, other_losses, pgd_step, topk_flips
from benchmarks.registry import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        clip_loss.CLIP_LOSS,
        clip_loss.CLIP_LOSS_FORWARD,
        other_losses.CLIP_LOSS_BANKS,
        other_losses.SIGMOID_LOSS,
        other_losses.SUP_CON,
        labelled.BOUNDED_INVERSE,
        labelled.CONTRASTIVE_UNLEARNING,
        labelled.SUP_CON_KEYS,
        topk_flips.TOPK_FLIPS,
        pgd_step.PGD_STEP,
    )
}
