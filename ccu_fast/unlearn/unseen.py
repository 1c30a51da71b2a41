"""What an item would be to the model had it never been seen: a level of log-odds for each item to forget.

An item that was trained on is told with more certainty than one that was not. How much more is read off items that were
never trained on: an item to forget gets the level of the unseen item that is as hard among the unseen as it is among
those to forget::

    m(x) = log-odds of what x is: its class at the visual head, or its partner among frozen other embeddings
    p_i  = rank of m(u_i) among the items to forget, under the original model, in (0, 1)
    t_i  = the p_i-quantile of m over unseen items

What is hard for the trained model is mostly so for one that never saw it: which items are told wrong, not only how
many, is then much as after retraining.

Where what is hard says nothing of what would be, as with pairs that were all learned by heart, one level for all is
enough, a ceiling: t_i is a quantile of m over unseen items, and what is below it is drawn up weakly. What goes down
need not come up to the right place again, one item at a time, and that leaves more of the model as it was.

Without unseen items, retained ones that are half another picture stand in for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import OTHER
from ccu_fast.runs.kept import Kept
from ccu_fast.unlearn.loop import CHUNK, embed, embed_other, embed_visual
from ccu_fast.unlearn.model import CLIP_SCALE, TwoModalityModel, heads
from ccu_fast.unlearn.objective import class_log_odds

UNSEEN = 256  # unseen items whose log-odds are taken, in every step if they are not stand-ins
PARTNERS = 512  # frozen other embeddings among which a pair's partner is sought
POOL = 2048  # retained items among which the nearest is sought
FEATURES = 4096  # of an input, evenly spread, that nearness is measured by
HALF = 0.5  # of a stand-in is another picture


class Levels:
    """The log-odds that items to forget should have, and those they have.

    Args:
        frozen: the original model.
        forget, retain: the two sets.
        u0, a0: visual and other embeddings of the forget set under the original model.
        unseen: items never trained on, of the same kind; None for stand-ins.
        group: items with equal ``ids // group`` are views of one thing.
        seed: of the samples of the retain set; of more unseen items than are used always the same are.
        kept: where the frozen model's embeddings are kept; None: nowhere.
        ceiling: the quantile that is every item's level; None: each has its own.

    Raises:
        ValueError: no unseen items, and inputs that cannot be blended; pairs, and nothing retained to tell them from.
    """

    def __init__(
        self,
        frozen: TwoModalityModel,
        forget: PairedData,
        retain: PairedData,
        u0: Tensor,
        a0: Tensor,
        unseen: PairedData | None,
        *,
        group: int,
        seed: int,
        kept: Kept | None = None,
        ceiling: float | None = None,
    ) -> None:
        self.group = group
        self.by_class = forget.labelled and "visual" in heads(frozen)
        self.scale = getattr(frozen, "scale", CLIP_SCALE)
        self.live = unseen is not None
        if unseen is None:  # those whose stand-ins are made, which are not held
            self.unseen = sample(sample(retain, POOL, seed), UNSEEN, seed)
        else:
            self.unseen = sample(unseen, UNSEEN, 0).in_memory()
        partners = sample(retain, PARTNERS, seed + 1)

        def embedded() -> tuple[Tensor, ...]:
            items = self.unseen if self.live else stand_ins(retain, UNSEEN, group=group, seed=seed)
            return *embed(frozen, items), embed_other(frozen, partners.other)

        visual, self.unseen_other, self.keys = (Kept() if kept is None else kept).of("levels", embedded)
        self.key_ids = partners.ids // group
        if not self.by_class:
            _check_partners(self.key_ids, torch.cat([forget.ids, self.unseen.ids]) // group)
        with torch.no_grad():
            self.at_start = self.log_odds(frozen, visual, self.unseen_other, self.unseen)
            own = self.log_odds(frozen, u0, a0, forget)
        below, not_above = (torch.searchsorted(own.sort().values, own, right=right) for right in (False, True))
        self.rank = (below + not_above).double() / (2 * len(own))
        if ceiling is not None:
            self.rank = torch.full_like(self.rank, ceiling)

    def log_odds(self, model: TwoModalityModel, visual: Tensor, other: Tensor, data: PairedData) -> Tensor:
        """What each item is to the model, ``[N]``, in nats, from its embedding and its partner's frozen one."""
        if self.by_class:
            return class_log_odds(model.classify_visual(visual), data.labels)
        (rest,), _ = reduce_similarity(
            visual,
            self.keys,
            scale=self.scale,
            paired=False,
            row_ids=data.ids // self.group,
            col_ids=self.key_ids,
            rows=[("lse", OTHER)],
        )
        return self.scale * (visual * other).sum(-1) - rest

    def of(self, model: TwoModalityModel, rows: Tensor) -> Tensor:
        """The levels of these rows of the forget set, without gradients.

        Unseen items are asked again, because what the model makes of them moves with it; stand-ins are not, because
        training on the retained items they are made of makes them look more and more like those.
        """
        if not self.live:
            return self._quantiles(self.at_start, self.rank[rows])
        with torch.no_grad():
            visual = embed_visual(model, self.unseen.visual)
            now = self.log_odds(model, visual, self.unseen_other, self.unseen)
        return self._quantiles(now, self.rank[rows])

    @staticmethod
    def _quantiles(log_odds: Tensor, ranks: Tensor) -> Tensor:
        return log_odds.double().quantile(ranks).to(log_odds.dtype)


def check_levels(
    model: TwoModalityModel, forget: PairedData, retain: PairedData, unseen: PairedData | None, *, group: int
) -> None:
    """Raise the errors of :class:`Levels` without its work; the arguments are the same."""
    things = retain.ids // group
    if unseen is None:
        _check_blends(retain.visual, things)
    elif not (forget.labelled and "visual" in heads(model)):
        _check_partners(things, torch.cat([forget.ids, unseen.ids]) // group)


def _check_partners(things: Tensor, own: Tensor) -> None:
    if len(things.unique()) == 1 and bool((own == things[0]).any()):
        raise ValueError("retain: expected items of another thing too, got views of one that is to be forgotten")


def _check_blends(visual: Tensor, things: Tensor) -> None:
    if not comparable(visual):
        raise ValueError(
            "unseen: expected items never trained on, because visual inputs of "
            f"{str(visual.dtype).removeprefix('torch.')} cannot be blended into stand-ins, got None"
        )
    if bool((things == things[0]).all()):
        raise ValueError("retain: expected items of at least two things, got one")


def sample(data: PairedData, count: int, seed: int) -> PairedData:
    """At most ``count`` of the items, drawn at random, in their order; those on a disk are not read."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    return data.select(order.sort().values.to(data.labels.device))


def stand_ins(retain: PairedData, count: int, *, group: int, seed: int) -> PairedData:
    """Retained items whose visual input is half that of the item that looks most like it::

        x_i' = (x_i + x_j) / 2,   j = the nearest item of another thing (:func:`nearest`)

    A model that has learned its training items by heart is as unsure of what lies between two of them as of new ones.

    Args:
        retain: the items to keep.
        count: how many, at least 1; fewer where there are fewer items.
        group: items with equal ``ids // group`` are views of one thing.
        seed: of the sample.

    Raises:
        ValueError: inputs that are neither floating point nor uint8; fewer than two things.
    """
    pool = sample(retain, POOL, seed)
    whole, things = pool.visual, pool.ids // group  # maybe on a disk: of all of it only the features are held
    _check_blends(whole, things)
    some = sample(pool, count, seed).in_memory()
    thing = some.ids // group
    blended = some.visual.float().lerp(whole[nearest(some.visual, whole, thing, things)].float(), HALF)
    made = some.to(some.labels.device)
    object.__setattr__(made, "visual", blended.to(whole.dtype))
    return made


def comparable(inputs: Tensor) -> bool:
    """Whether inputs are numbers that measure something, as pixels do and token ids do not."""
    return inputs.is_floating_point() or inputs.dtype == torch.uint8


def nearest(x: Tensor, y: Tensor, thing: Tensor | None = None, things: Tensor | None = None) -> Tensor:
    """For each input of x the row of y that looks most like it, by the cosine of the inputs less their mean.

    Args:
        x, y: inputs ``[N, ...]`` and ``[M, ...]`` of one shape; at most 4096 evenly spread numbers of each count, and
            no more are held of those on a disk.
        thing, things: int64 ``[N]`` and ``[M]``; rows of y of the same thing are passed over.

    Returns:
        int64 ``[N]``, rows of y.
    """
    check.shape("y", y, [len(y), *x.shape[1:]])
    numbers = math.prod(x.shape[1:])
    columns = torch.linspace(0, numbers - 1, min(FEATURES, numbers)).round().long().to(x.device)
    a, b = (torch.cat([part.flatten(1)[:, columns].float() for part in z.split(CHUNK)]) for z in (x, y))
    mean = b.mean(0)
    s = F.normalize(a - mean, dim=1) @ F.normalize(b - mean, dim=1).T
    if thing is not None and things is not None:
        s = s.masked_fill(thing[:, None] == things[None], -torch.inf)
    return s.argmax(1)
