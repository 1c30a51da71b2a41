"""A round over pictures that keep their size: the model sees them through windows, see :mod:`ccu_fast.mem.views`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ccu_fast.mem.round import Purpose, Round
from ccu_fast.mem.source import ahead
from ccu_fast.mem.views import Pictures, Views

OTHERS = 2  # windows of a batch besides the model's own, between which the steps of the noise alternate


class ViewRound(Round):
    """See the module. Triggers and the losses that are told are those of the model's own centre crop."""

    def _read(
        self, plan: list[Tensor], image_of: Tensor | None, purpose: Purpose
    ) -> Iterator[tuple[Tensor, Tensor | Views]]:
        source = cast(Pictures, self.source)
        anywhere = self.settings.view_area < 1
        # The surrogate learns from one window of each picture; noise is made for the model's own and for some others.
        own = purpose != "train" or not anywhere
        count = 0 if purpose == "look" or not anywhere else 1 if purpose == "train" else OTHERS

        def draw(part: Tensor) -> Tensor:
            draws = torch.rand(count, len(part), 3, generator=self.rng, dtype=torch.float64)
            draws[..., 0] = 1 - draws[..., 0] * (1 - self.settings.view_area)
            return draws

        def read(asked: tuple[Tensor, Tensor]) -> Views:
            part, draws = asked
            return source.views(part if image_of is None else image_of[part], draws, own=own)

        for (part, _), views in ahead(read, [(part, draw(part)) for part in plan]):
            yield part, views

    def _noisy(self, images: Any, index: Tensor) -> Tensor:
        views = cast(Views, images).to(self.device)
        if self.method.attacks_clean_model and not self.losses["surrogate"]:
            return views.pixels[0]
        return views.shown(self.store.gather(index, dtype=torch.int8).float())
