"""``Settings(compat=True)``: a round that decides as the authors' code does.

Kept: noise and triggers for each row; rows in their order, the remainder of a pass left out; the surrogate on shuffled
full batches; in a pass, for each batch first the triggers, then the noise; all trigger positions scored by one
gradient, over the whole vocabulary; candidate k of every row tried together and accepted on the batch's mean; captions
permuted at every PGD step while triggers stay. A model sees noisy pixels cut to valid ones. A PGD step starts from
those and takes the gradient by them; its noise is limited before it is cut again, so stored noise may lead beyond them.

Not kept, because no decision depends on it: the image tower is run once for all candidates, positions after the last
EOT are left out, weights get no gradient in a pass. Rows are images here: the noise store has one row for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ccu_fast.losses.functional import info_nce
from ccu_fast.mem.round import Phase, Place, Round
from ccu_fast.mem.source import read_ahead
from ccu_fast.mem.surrogate import frozen
from ccu_fast.mem.triggers import encode_many
from ccu_fast.ops.pgd_step.api import pgd_step_
from ccu_fast.ops.topk_flips.api import TokenTable, topk_flips


class CompatRound(Round):
    """See the module."""

    def phases(self, index: int) -> dict[Phase, int]:
        # One pass for both: that of "triggers" makes noise, too.
        last: Phase = "triggers" if self.method.triggers and index < self.settings.search_rounds else "noise"
        return {"surrogate": self.settings.surrogate_steps, last: len(self.tokens) // self.settings.batch}

    def cost(self, phase: Phase) -> int:
        return super().cost(phase) + (super().cost("noise") if phase == "triggers" else 0)

    def changes_noise(self, phase: Phase) -> bool:
        return phase != "surrogate" and self.method.noise != "none"

    def _starts_anew(self, index: int) -> bool:
        return index == 0

    def begin(self, phase: Phase, count: int) -> Place:
        if phase == "surrogate":
            return super().begin(phase, count)
        return Place(phase, self._full(torch.arange(len(self.tokens))), [], None, {phase: [], "noise": []})

    def _read(self, place: Place) -> Iterator[tuple[Tensor, Tensor]]:
        return read_ahead(self.source, place.plan[place.done :], self.source.image_of)

    def _batch(self, place: Place, part: Tensor, images: Any) -> None:
        if place.phase == "surrogate":
            return super()._batch(place, part, images)
        base = self._levels(images)
        with frozen(self.surrogate):
            if place.phase == "triggers":
                # The authors look at every row. One behind the tokenizer's last id is no text that could be published.
                place.losses["triggers"].append(self._triggers(base, part, self.tables()[0]))
            if self.method.noise != "none":
                place.losses["noise"].append(self._noise(base, part))
        return None

    def _order(self) -> list[Tensor]:
        return self._full(torch.randperm(len(self.tokens), generator=self.rng))[::-1]

    def _full(self, order: Tensor) -> list[Tensor]:
        return [part for part in order.split(self.settings.batch) if len(part) == self.settings.batch]

    def _shown(self, images: Any, rows: Tensor) -> Tensor:
        return self._cut(self._levels(images), self._steps(rows)) / 255

    def _text(self, rows: Tensor) -> Tensor:
        return self._ids(rows, rows)

    def _levels(self, images: Tensor) -> Tensor:
        """Pixels in 1/255."""
        return images.to(self.device, self.surrogate.embedding_matrix.dtype)

    def _steps(self, rows: Tensor) -> Tensor:
        """The rows' noise in 1/255."""
        return self.store.gather(rows, dtype=torch.int8).to(self.surrogate.embedding_matrix.dtype)

    @staticmethod
    def _cut(base: Tensor, delta: Tensor) -> Tensor:
        return (base + delta).clamp(0, 255)

    def _triggers(self, base: Tensor, rows: Tensor, table: TokenTable) -> Tensor:
        model, length, k = self.surrogate, self.method.triggers, self.settings.candidates
        tokens = self._text(rows)
        scale = model.scale.detach()
        with torch.no_grad():
            image = self.encode_image(self._cut(base, self._steps(rows)) / 255)
        embeddings = model.embedding_matrix[tokens].detach().requires_grad_(True)
        loss = info_nce(image, model.encode_text(tokens, embeddings), scale=scale)
        (grad,) = torch.autograd.grad(loss, embeddings)
        flips = topk_flips(grad[:, 1 : length + 1], table, k)
        with torch.no_grad():
            for p in range(length):
                options = torch.cat([flips.ids[:, p], tokens[:, p + 1 : p + 2]], 1)  # the current one last
                trials = tokens[None].repeat(k + 1, 1, 1)
                trials[:, :, p + 1] = options.T
                text = encode_many(model, trials.flatten(0, 1), self.tokenizer.eot).view(k + 1, len(rows), -1)
                means = info_nce(image.expand(k + 1, -1, -1), text, scale=scale)
                best = means.argmin()
                # Ties: the authors keep the first that is strictly better than all before it.
                tokens[:, p + 1] = options.gather(1, best.expand(len(rows), 1))[:, 0]
        self.triggers[rows] = tokens[:, 1 : length + 1].cpu()
        return means[best]

    def _noise(self, base: Tensor, rows: Tensor) -> Tensor:
        s, model = self.settings, self.surrogate
        delta = self._steps(rows)
        free = torch.zeros_like(base)
        scale = model.scale.detach()
        loss = base.new_zeros(())
        for _ in range(s.pgd_steps):
            order = torch.randperm(len(rows), generator=self.rng)
            with torch.no_grad():
                text = model.encode_text(self._ids(rows[order], rows))
            noisy = self._cut(base, delta).requires_grad_(True)
            loss = info_nce(self.encode_image(noisy / 255), text, scale=scale)
            (grad,) = torch.autograd.grad(loss, noisy)
            delta, loss = noisy.detach() - base, loss.detach()
            pgd_step_(
                delta, grad, free, step=float(s.step), eps=float(s.eps), lower=-255.0, upper=255.0, nan_policy="zero"
            )
        self.store.scatter_(rows, delta.to(torch.int8))
        return loss
