"""SALMUBench's sets as a problem of unlearning pairs, its measures of an unlearned model, and the ways to fail.

Source: Selvas-Sala, Kang and Gomez, SALMUBench (CVPR 2026, arXiv 2603.26316). Of its measures these are taken:

- *strength* (there AssocStr, InterIdSim, IntraIdSim): the mean cosine of a portrait and the caption that tells its
  attribute, on the forget set, on holdout identity and on holdout association;
- *strength_described* (VisIdInt): the same on the pairs of the retain set that show persons of the forget set;
- *retrieval* (RetFail): the mean reciprocal rank of that caption for the portraits of the forget set;
- *general knowledge* (GenKnow), there the zero-shot accuracy on ImageNet.

:data:`NOT_MEASURED` are the others. The paper's own text and evaluation code could not be had: what its measures are is
known from summaries and from public code that runs that evaluation. So is what it counts as a failure, for which they
give no bounds; those here are this project's, see :func:`failures`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.data.associations import KINDS, WORDINGS, Captioned, load_associations
from ccu_fast.data.paired import PairedData
from ccu_fast.data.salmubench import read_split
from ccu_fast.mem.tokenizer import WordTokenizer
from ccu_fast.models.dual_encoder import SmallDualEncoder
from ccu_fast.models.named import Model
from ccu_fast.runs.retrieval import retrieval_ranks
from ccu_fast.unlearn.loop import CHUNK, embed, embed_visual
from ccu_fast.unlearn.model import TwoModalityModel, evaluating

NOT_MEASURED = {
    "ACS": "the accuracy of a logistic regression that tells right captions from shuffled ones, of which no source "
    "says what it is given or what it is tested on",
    "IdZSC": "whether a portrait finds the person's name, which is private there and in no private caption here",
    "CoreAssoc": "the same name with the attribute as a caption",
    "FragSim": "the mean cosine on retained pairs of a published list, of which no source says how it was made",
}
HELD_OUT = ("holdout_identity", "holdout_association")
SETS = ("forget", *HELD_OUT)
FAILURES = ("catastrophic", "over-generalised", "ineffective")
REMAINS = 0.1  # of the difference between the compromised and the clean model
COLLAPSE = 0.02  # of general knowledge; the paper calls a method catastrophic that loses .023, and none that loses .008
ROUNDING = 1e-9  # of a difference of two shares: 8 of 400 are not more than 2 points, 4 not more than 1
DISTRACTORS = (
    1000  # captions of the forget set, and of pictures of nobody in it, that RetFail hides the right one among
)
AIM = 0.05  # of the same difference, for the forget set
POINT = 0.01  # that the held-out sets and general knowledge may move


@dataclass(frozen=True)
class Problem:
    """What methods get, and what they are judged by.

    Attributes:
        forget, retain: the two sets.
        unseen: associations that neither model was told.
        invented: captions that tell attributes of nobody, with pictures that they say nothing of.
        described: retained pairs of persons of the forget set; maybe none.
        held_out: by name of :data:`HELD_OUT`; no method gets them.
        retrieval, knowledge: a model's figure, in [0, 1].
    """

    forget: PairedData
    retain: PairedData
    unseen: PairedData
    invented: PairedData
    described: PairedData
    held_out: dict[str, PairedData]
    retrieval: Callable[[TwoModalityModel], float]
    knowledge: Callable[[TwoModalityModel], float]

    def to(self, device: str) -> Problem:
        """The same with its sets on a device; the figures' inputs follow the model that is asked."""
        names = ("forget", "retain", "unseen", "invented", "described")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved, held_out={name: data.to(device) for name, data in self.held_out.items()})

    def judge(self, model: TwoModalityModel) -> dict[str, float]:
        """Strength on each of the three sets and on what is described, if anything; retrieval, general knowledge."""
        sets = {"forget": self.forget, **self.held_out, "described": self.described}
        found = {f"strength_{name}": strength(model, data) for name, data in sets.items() if len(data)}
        return {**found, "retrieval": self.retrieval(model), "knowledge": self.knowledge(model)}


def strength(model: TwoModalityModel, data: PairedData) -> float:
    """The mean cosine of the two halves of a pair."""
    visual, other = embed(model, data)
    return float((visual.double() * other.double()).sum(-1).mean())


def remaining(figures: Mapping[str, float], before: Mapping[str, float], clean: Mapping[str, float]) -> float:
    """The share of the association with the forget set that is left: 1 as compromised, 0 as clean, below 0 beyond."""
    name = "strength_forget"
    return (figures[name] - clean[name]) / (before[name] - clean[name])


def lost(name: str, figures: Mapping[str, float], before: Mapping[str, float], clean: Mapping[str, float]) -> float:
    """The share of what the compromised model knows of a held-out set, and the clean one does not, that is gone."""
    key = f"strength_{name}"
    return (before[key] - figures[key]) / (before[key] - clean[key])


def failures(figures: Mapping[str, float], before: Mapping[str, float], clean: Mapping[str, float]) -> dict[str, bool]:
    """The paper's three ways to fail, within bounds of our own.

    Catastrophic: general knowledge falls by more than 2 points. Ineffective: more than a tenth of the association is
    left. Over-generalised: more than a tenth of what was known of a held-out set is gone, or the association is pushed
    below the clean model's by more than a tenth.

    Args:
        figures, before, clean: what :meth:`Problem.judge` says of the model, the compromised one and the clean one.
    """
    left = remaining(figures, before, clean)
    beyond = max(lost(name, figures, before, clean) for name in HELD_OUT)
    return {
        "catastrophic": before["knowledge"] - figures["knowledge"] > COLLAPSE + ROUNDING,
        "over-generalised": beyond > REMAINS or left < -REMAINS,
        "ineffective": left > REMAINS,
    }


def aims(figures: Mapping[str, float], before: Mapping[str, float], clean: Mapping[str, float]) -> dict[str, bool]:
    """What would be as good as asked: the association within 5 % of the clean model's, the rest within a point."""
    kept = ["knowledge", *(f"strength_{name}" for name in HELD_OUT)]
    return {
        "forget": abs(remaining(figures, before, clean)) <= AIM,
        **{name.removeprefix("strength_"): abs(figures[name] - before[name]) <= POINT + ROUNDING for name in kept},
    }


def judged(figures: Mapping[str, float], before: Mapping[str, float], clean: Mapping[str, float]) -> dict[str, Any]:
    """A model's figures against those of the two it is between: shares in %, changes in points.

    Returns:
        ``left`` and ``lost``, of the held-out set that suffers more; the changes of the held-out strengths, of
        ``strength_described`` where there is one and of ``knowledge``; ``retrieval``; ``failures`` and ``aims``.
    """
    moved = ["knowledge", *(f"strength_{name}" for name in (*HELD_OUT, "described"))]
    return {
        "left": 100 * remaining(figures, before, clean),
        "lost": 100 * max(lost(name, figures, before, clean) for name in HELD_OUT),
        "retrieval": figures["retrieval"],
        **{name: 100 * (figures[name] - before[name]) for name in moved if name in figures},
        "failures": failures(figures, before, clean),
        "aims": aims(figures, before, clean),
    }


def far(judgement: Mapping[str, Any]) -> float:
    """How far a model is from what is asked: the larger of what is left, without its sign, and of what is lost."""
    return float(max(abs(judgement["left"]), judgement["lost"]))


def collapsed(knowledge: float) -> bool:
    """Whether general knowledge fell by more than the bound; its change in points."""
    return knowledge < -100 * (COLLAPSE + ROUNDING)


class SmallClip(SmallDualEncoder):
    """Of convolutions and one block for text, as two towers for unlearning."""

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Pictures → unit vectors ``[N, D]``."""
        return self.encode_image(visual)

    def embed_other(self, other: Tensor) -> Tensor:
        """Token ids → unit vectors ``[N, D]``."""
        return self.encode_text(other)


def pictogram_problem(
    packages: Path, seed: int, *, invented: int = 4800, width: int = 64, **sizes: int
) -> tuple[Problem, PairedData, Callable[[], Any]]:
    """The problem, all that the compromised model is trained on, and a maker of models; the clean one gets ``retain``.

    Retrieval is among the captions of this wording that tell an attribute of this kind, one of each person: the value
    alone tells them apart. General knowledge is the share of another artist's drawings whose thing's name comes first.

    Args:
        packages, seed, sizes: of :func:`ccu_fast.data.associations.load_associations`.
        invented: captions of nobody.
        width: of the model.
    """
    made = load_associations(packages, seed, **sizes)
    tokenizer = WordTokenizer(made.vocabulary)
    kinds = [(kind, wording) for kind in range(len(KINDS)) for wording in range(len(WORDINGS[KINDS[kind]]))]
    told = [made.told(*which, made.persons) for which in kinds]
    fake = made.invented(invented, seed)
    every = [made.base, made.forget, made.holdout_identity, made.holdout_association, made.unseen]
    everything = [caption for part in every for caption in part.captions]
    length = tokenizer.encode([*everything, *fake, *made.names, *(text for texts in told for text in texts)]).shape[1]

    def encode(captions: Sequence[str]) -> Tensor:
        ids = tokenizer.encode(captions)
        return F.pad(ids, (0, length - ids.shape[1]), value=tokenizer.pad)

    first = 0
    items = []
    for part in every:
        items.append(PairedData(part.pictures, encode(part.captions), ids=torch.arange(first, first + len(part))))
        first += len(part)
    base, forget, identity, association, unseen = items
    drawn = torch.randint(len(base), (invented,), generator=torch.Generator().manual_seed(seed))
    nobody = PairedData(base.visual[drawn], encode(fake), ids=torch.arange(first, first + invented))
    galleries = torch.stack([encode(texts) for texts in told])
    gallery_of = torch.tensor([kinds.index(which) for which in _kinds(made.forget)])
    persons = torch.tensor(made.persons)

    def retrieval(model: TwoModalityModel) -> float:
        visual = _pictures(model, forget.visual)
        ranks = []
        for number in gallery_of.unique().tolist():
            asked = gallery_of == number
            keys = _texts(model, galleries[number])
            ranks.append(retrieval_ranks(visual[asked], keys, made.forget.things[asked], persons))
        return float((1 / torch.cat(ranks).double()).mean())

    names, test = encode(made.names), made.test

    def knowledge(model: TwoModalityModel) -> float:
        found = retrieval_ranks(_pictures(model, test.pictures), _texts(model, names), test.things, test.things)
        return float((found == 1).double().mean())

    held_out = dict(zip(HELD_OUT, (identity, association), strict=True))
    described = base[torch.isin(made.base.things, made.forget.things)]
    problem = Problem(forget, base, unseen, nobody, described, held_out, retrieval, knowledge)
    side = made.base.pictures.shape[-1]

    def make() -> SmallClip:
        size, eot = (side, side), tokenizer.eot
        return SmallClip(
            len(tokenizer), eot, image_size=size, channels=3, width=width, dim=width, text_depth=1, context=length
        )

    return problem, joined(base, forget, identity, association), make


def published_problem(folder: Path, named: Model, *, most: int | None, seed: int = 0) -> Problem:
    """The problem of a folder with SALMUBench's files (:mod:`ccu_fast.data.salmubench`) for a named CLIP.

    Retrieval is as in the paper among 1,000 captions of the forget set and 1,000 of pictures of nobody in it. In place
    of ImageNet, which is not in the folder, general knowledge is the share of those pictures whose caption comes first
    among theirs. Invented captions are those to forget with other digits, unseen pairs portraits of the forget set with
    such captions of others.

    Args:
        folder: with the data set.
        named: whose tokenizer and input are used.
        most: rows of each split; None for all.
        seed: of what is drawn.

    Raises:
        ValueError: no caption to forget has a digit, or no row of retain_synth is of nobody.
    """
    splits = {
        name: read_split(folder, name, named.image_shape, most=most, seed=seed) for name in (*SETS, "retain_synth")
    }
    forget, retain = splits["forget"], splits["retain_synth"]
    strangers = retain.where(lambda identity: identity is None)
    if not len(strangers):
        raise ValueError(f"folder: expected rows of retain_synth without an identity in {folder}, got none")
    rng = torch.Generator().manual_seed(seed)
    rows = [row for row, caption in enumerate(forget.captions) if re.search("[0-9]", caption)]
    if not rows:
        raise ValueError(f"folder: expected captions with digits in the split forget of {folder}, got none")
    fake = [other_digits(forget.captions[row], rng) for row in rows]
    captions = [text for part in splits.values() for text in part.captions]
    length = named.tokenizer.encode([*captions, *fake]).shape[1]

    def encode(texts: Sequence[str]) -> Tensor:
        ids = named.tokenizer.encode(texts)
        return F.pad(ids, (0, length - ids.shape[1]), value=named.tokenizer.pad)

    first = 0
    data = {}
    for name, part in splits.items():
        data[name] = PairedData(part.pictures, encode(part.captions), ids=torch.arange(first, first + len(part)))
        first += len(part)
    portrait = torch.randint(len(forget), (len(fake),), generator=rng)
    shown = torch.randint(len(strangers), (len(fake),), generator=rng)
    ids = torch.arange(first, first + 2 * len(fake))
    unseen, nobody = (
        PairedData(pictures, encode(fake), ids=part)
        for pictures, part in zip((forget.pictures[portrait], strangers.pictures[shown]), ids.chunk(2), strict=True)
    )
    distractors = [*_some(forget.captions, rng), *_some(strangers.captions, rng)]

    def retrieval(model: TwoModalityModel) -> float:
        visual, own = _pictures(model, data["forget"].visual), _texts(model, data["forget"].other)
        # The right caption counts once: a distractor of the same words is none.
        same = torch.tensor([[text == other for other in distractors] for text in forget.captions])
        scores = (visual.double() @ _texts(model, encode(distractors)).double().mT).masked_fill(same, -torch.inf)
        right = (visual.double() * own.double()).sum(-1, keepdim=True)
        return float((1 / (1 + (scores >= right).sum(1)).double()).mean())

    def knowledge(model: TwoModalityModel) -> float:
        texts = {text: number for number, text in enumerate(dict.fromkeys(strangers.captions))}
        group = torch.tensor([texts[text] for text in strangers.captions])
        keys = _texts(model, encode(list(texts)))
        found = retrieval_ranks(_pictures(model, strangers.pictures), keys, group, torch.arange(len(texts)))
        return float((found == 1).double().mean())

    persons = set(forget.identities) - {None}
    described = data["retain_synth"][torch.tensor([who in persons for who in retain.identities])]
    held_out = {name: data[name] for name in HELD_OUT}
    return Problem(data["forget"], data["retain_synth"], unseen, nobody, described, held_out, retrieval, knowledge)


def other_digits(text: str, rng: torch.Generator) -> str:
    """The text with every digit drawn anew, and at least one of them another: it must have one."""
    changed = text
    while changed == text:
        drawn = torch.randint(10, (len(text),), generator=rng).tolist()
        changed = "".join(
            str(digit) if "0" <= letter <= "9" else letter for letter, digit in zip(text, drawn, strict=True)
        )
    return changed


def joined(*parts: PairedData) -> PairedData:
    """The items of all of them, which have different ids."""
    visual, other, ids = (torch.cat([getattr(part, name) for part in parts]) for name in ("visual", "other", "ids"))
    return PairedData(visual, other, ids=ids)


def _kinds(part: Captioned) -> list[tuple[int, int]]:
    return list(zip(part.kinds.tolist(), part.wordings.tolist(), strict=True))


def _pictures(model: TwoModalityModel, visual: Tensor) -> Tensor:
    """Embeddings, on the CPU wherever the model is."""
    return embed_visual(model, visual.to(next(model.parameters()).device)).cpu()


def _texts(model: TwoModalityModel, other: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model.embed_other(part.to(device)).cpu() for part in other.split(CHUNK)])


def _some(captions: Sequence[str], rng: torch.Generator) -> list[str]:
    distinct = list(dict.fromkeys(captions))
    return [distinct[i] for i in torch.randperm(len(distinct), generator=rng)[:DISTRACTORS].tolist()]
