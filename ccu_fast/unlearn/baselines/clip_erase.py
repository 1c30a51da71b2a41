"""CLIPErase-style: the two halves of an item to forget are made dissimilar.

    forgetting    mean_i( u_i · a_i )                                     on the forget batch
    retention     the loss the model was trained on                       on the retain batch
    consistency   KL(p⁰ ‖ p) of the visual + the same of the other half   on the retain batch
    loss = 1 · retention + 3 · forgetting + 3 · consistency

Source: Yang et al. 2025, CLIPErase (arXiv 2410.23330) and its weights; Adam at 1e-6, batches of 16. For
CLIP the retention loss is the contrastive one, as there; a classifier has its cross-entropies instead. The paper does
not say over what the unimodal distribution p is taken: here over the classes of the modality's own head or, without
heads, over the features of the embedding, softmax(z / 0.07). Like the original it severs the link between the halves
and has no term against what the visual modality knows alone.
"""

from __future__ import annotations

from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.predictions import distillation_loss
from ccu_fast.unlearn.loop import Batch, Step, embed
from ccu_fast.unlearn.model import CLIP_SCALE, TwoModalityModel, heads, task_loss

FORGETTING, CONSISTENCY = 3.0, 3.0


def clip_erase(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """The method."""
    r0_all, b0_all = embed(frozen, retain)

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        n = len(batch.forget)
        visual, other = batch.embed(model)
        taught = unimodal(frozen, r0_all[batch.retain_rows], b0_all[batch.retain_rows])
        return (
            task_loss(model, visual[n:], other[n:], batch.retain.labels)
            + FORGETTING * (visual[:n] * other[:n]).sum(-1).mean()
            + CONSISTENCY * distillation_loss(unimodal(model, visual[n:], other[n:]), taught)
        )

    return step


def unimodal(model: TwoModalityModel, visual: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Logits of what each modality says alone."""
    if not {"visual", "other"} <= set(heads(model)):
        return {"visual": CLIP_SCALE * visual, "other": CLIP_SCALE * other}
    return {"visual": model.classify_visual(visual), "other": model.classify_other(other)}
