"""A model of two towers with the roles of its modalities exchanged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Swapped(nn.Module):
    """Two towers the other way around: what was "other", such as captions, is the modality to forget.

    An association of a picture with a private fact is best forgotten on the side of the caption, which belongs to it
    alone; the same picture has other captions that are to stay. Its data are swapped with
    :meth:`ccu_fast.unlearn.PairedData.swapped`. Heads are not taken over.

    Args:
        model: with ``embed_visual`` and ``embed_other``; it is not copied.

    Attributes:
        model: the same.

    Raises:
        TypeError: it lacks one of the two.

    >>> from ccu_fast.models.fusion import FusionModel
    >>> model = FusionModel(visual_dim=8, other_dim=6, classes=3)
    >>> from ccu_fast.models.swapped import Swapped
    >>> Swapped(model).embed_visual(torch.ones(2, 6)).shape
    torch.Size([2, 64])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in ("embed_visual", "embed_other"):
            if not callable(getattr(model, name, None)):
                raise TypeError(
                    f"model: expected embed_visual and embed_other, got a {type(model).__name__} without {name}"
                )
        self.model: Any = model

    def __getattr__(self, name: str) -> Any:
        # A model without a scale of its own has none swapped either; nn.Module's own look-up comes first.
        if name == "scale":
            return self.model.scale
        return super().__getattr__(name)

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Inputs of the model's other modality → unit vectors ``[N, D]``."""
        found: Tensor = self.model.embed_other(visual)
        return found

    def embed_other(self, other: Tensor) -> Tensor:
        """Inputs of the model's visual modality → unit vectors ``[N, D]``."""
        found: Tensor = self.model.embed_visual(other)
        return found
