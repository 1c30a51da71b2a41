"""The layers of the Kernel Hub's package: forwards for ``kernels.kernelize`` to put in the place of open_clip's.

``kernels`` binds a forward to the module that it replaces, so ``self`` is open_clip's own loss; a layer has neither
a constructor nor anything else of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ccu_fast.distributed import open_clip


class ClipLoss(nn.Module):
    """The forward of ``open_clip.ClipLoss``: the same value and gradients, without the logits in memory.

    The result is an fp32 scalar, where open_clip's is in the dtype of the features.
    """

    can_torch_compile: bool = True

    def forward(
        self: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one process, or with the module's ``world_size`` of all."""
        loss = open_clip.ClipLoss(
            self.local_loss,
            self.gather_with_grad,
            rank=self.rank,
            world_size=self.world_size,
            use_horovod=self.use_horovod,
        )
        return loss(image_features, text_features, logit_scale, logit_bias, output_dict)


class SigLipLoss(nn.Module):
    """The forward of ``open_clip.SigLipLoss``: the same value and gradients, without the logits in memory.

    The result is an fp32 scalar, where open_clip's is in the dtype of the features.
    """

    can_torch_compile: bool = True

    def forward(
        self: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one process, or with the module's ``world_size`` of all."""
        loss = open_clip.SigLipLoss(rank=self.rank, world_size=self.world_size)
        return loss(image_features, text_features, logit_scale, logit_bias, output_dict)
