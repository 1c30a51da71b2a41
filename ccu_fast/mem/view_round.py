"""A round over pictures that keep their size: the model sees them through windows, see :mod:`ccu_fast.mem.views`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ccu_fast.mem.round import Phase, Place, Round
from ccu_fast.mem.source import ahead
from ccu_fast.mem.views import Pictures, Views

OTHERS = 2  # windows of a batch besides the model's own, between which the steps of the noise alternate


class ViewRound(Round):
    """See the module. Triggers and the losses that are told are those of the model's own centre crop."""

    def _draws(self, phase: Phase, plan: list[Tensor]) -> list[Tensor]:
        # The surrogate learns from one window of each picture; noise is made for the model's own and for some others.
        anywhere = self.settings.view_area < 1
        count = 0 if phase == "triggers" or not anywhere else 1 if phase == "surrogate" else OTHERS

        def draw(part: Tensor) -> Tensor:
            draws = torch.rand(count, len(part), 3, generator=self.rng, dtype=torch.float64)
            draws[..., 0] = 1 - draws[..., 0] * (1 - self.settings.view_area)
            return draws

        return [draw(part) for part in plan]

    def _read(self, place: Place) -> Iterator[tuple[Tensor, Tensor | Views]]:
        source = cast(Pictures, self.source)
        own = place.phase != "surrogate" or self.settings.view_area == 1
        image_of = None if place.phase == "noise" else source.image_of

        def read(asked: tuple[Tensor, Tensor]) -> Views:
            part, draws = asked
            return source.views(part if image_of is None else image_of[part], draws, own=own)

        rest = zip(place.plan[place.done :], place.draws[place.done :], strict=True)
        for (part, _), views in ahead(read, rest):
            yield part, views

    def _noisy(self, images: Any, index: Tensor) -> Tensor:
        views = cast(Views, images).to(self.device)
        if self.method.attacks_clean_model and not self.losses["surrogate"]:
            return views.pixels[0]
        return views.shown(self.store.gather(index, dtype=torch.int8).float())
