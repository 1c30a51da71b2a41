"""The operations that are measured."""

from benchmarks.ops import (
    candidate_losses,
    ccu_objective,
    clip_loss,
    labelled,
    minilm,
    noise_add,
    noise_update,
    options,
    other_losses,
    pgd_step,
    topk_flips,
)
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
        options.INFO_NCE_HARD,
        options.INFO_NCE_MARGIN,
        options.INFO_NCE_GUIDE,
        options.INFO_NCE_PREFIXES,
        topk_flips.TOPK_FLIPS,
        *([minilm.MINILM_FLIPS] if minilm.installed() else []),
        candidate_losses.CANDIDATE_LOSSES,
        ccu_objective.CCU_OBJECTIVE,
        pgd_step.PGD_STEP,
        noise_add.NOISE_ADD,
        noise_update.NOISE_UPDATE,
    )
}
