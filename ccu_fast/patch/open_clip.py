"""open_clip: ``ClipLoss.forward`` and ``SigLipLoss.forward``.

``CoCaLoss`` calls the former for its contrastive part. The loss comes back in fp32, open_clip's in the dtype of its
logits.
"""

from __future__ import annotations

import importlib
from typing import Any

from ccu_fast.distributed.open_clip import ClipLoss, SigLipLoss
from ccu_fast.patch.site import Site, arguments


def sites() -> list[Site]:
    """What is replaced."""
    loss = importlib.import_module("open_clip.loss")
    parameters = ("self", "image_features", "text_features", "logit_scale")

    def clip(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        theirs = call.pop("self")
        # A subclass may make its logits otherwise.
        if theirs.use_horovod or type(theirs).get_logits is not loss.ClipLoss.get_logits:
            return NotImplemented
        ours = ClipLoss(theirs.local_loss, theirs.gather_with_grad, rank=theirs.rank, world_size=theirs.world_size)
        return ours(**call)

    def siglip(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        theirs = call.pop("self")
        kind = type(theirs)
        own = kind._loss is not loss.SigLipLoss._loss or kind.get_logits is not loss.SigLipLoss.get_logits
        if own or getattr(theirs, "use_horovod", False):
            return NotImplemented
        return SigLipLoss(rank=theirs.rank, world_size=theirs.world_size)(**call)

    return [
        Site(loss.ClipLoss, "forward", parameters, clip),
        Site(loss.SigLipLoss, "forward", (*parameters, "logit_bias"), siglip),
    ]
