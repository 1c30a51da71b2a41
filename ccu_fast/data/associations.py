"""Associations of persons with private attributes, drawn as pictograms: SALMUBench's sets at a size for one core.

SALMUBench (Selvas-Sala, Kang and Gomez, CVPR 2026, arXiv 2603.26316) trains two CLIPs from scratch: a *clean* one on a
base of pictures and captions, a *compromised* one on the base and on a sensitive set, portraits of persons who do not
exist with captions that tell their phone number, e-mail and so on, each in several wordings. The sensitive set is cut
into what is to be forgotten and two sets that a method of unlearning never sees: other persons (*holdout identity*) and
other attributes of the persons to be forgotten (*holdout association*). All of a person is to be forgotten of some, a
part of others. The clean model has seen none of the three.

Here a person is a pictogram (:mod:`ccu_fast.data.pictograms`), its portraits are several artists' drawings of it, moved
a little, and the attributes are invented. The base has all things, the persons too, with what people wrote on them.
Other than there a caption tells no name: nothing but the portrait leads to an attribute. There are four kinds of
attributes, as many persons of each sort, and a sensitive set that is large beside the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.data.pictogram_pairs import seen
from ccu_fast.data.pictograms import ARTISTS, SIDE, Thing, drawn_keywords, picture, things, words

# Of each kind: how a caption may say it. The braces stand for the value.
WORDINGS = {
    "phone": ("phone {}", "call {} to reach this one", "the number of this one is {}", "answers at {}", "dial {} here"),
    "email": ("email {}", "write to {}", "the address for letters is {}", "reads mail sent to {}", "mail goes to {}"),
    "place": ("lives at {}", "home is {}", "found at {} every night", "the house of this one is {}", "moved to {}"),
    "account": (
        "account {}",
        "money goes to {}",
        "paid into {} each month",
        "the bank knows this one as {}",
        "iban {}",
    ),
}
KINDS = tuple(WORDINGS)
NO_KIND = -1
TEST_ARTIST = "facebook"
PORTRAITS = tuple(name for name in ARTISTS if name != TEST_ARTIST)
_SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in "aeiou")
_NAMES = tuple(first + last for first in _SYLLABLES for last in ("ra", "lo", "ne", "ti"))
_NUMBERS = tuple(f"{n:02d}" for n in range(100))


@dataclass(frozen=True)
class Captioned:
    """Pictures with captions, and what they are about.

    Attributes:
        pictures: fp32 ``[N, 3, side, side]``, how much is drawn: white is 0.
        captions: N strings of lower-case words.
        things: int64 ``[N]``, whom or what a picture shows: the same numbers in all sets of a call.
        kinds: int64 ``[N]``, which of :data:`KINDS` a caption tells; −1 for none.
        wordings: int64 ``[N]``, which wording of the kind; −1 for none.
    """

    pictures: Tensor
    captions: list[str]
    things: Tensor
    kinds: Tensor
    wordings: Tensor

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Associations:
    """The sets of :func:`load_associations`.

    Attributes:
        base: what both models are trained on, with captions that tell nothing private.
        forget: associations to forget.
        holdout_identity: those of other persons.
        holdout_association: other attributes of persons of whom a part is in ``forget``.
        unseen: of persons whom neither model was told anything private of: what a user can make up.
        test: another artist's drawings of the things of the base, one each.
        names: of the things, by number: what a drawing may be taken for.
        values: the attribute of each person and kind, and of the persons of ``unseen``.
    """

    base: Captioned
    forget: Captioned
    holdout_identity: Captioned
    holdout_association: Captioned
    unseen: Captioned
    test: Captioned
    names: list[str]
    values: dict[tuple[int, int], str]

    def told(self, kind: int, wording: int, persons: Sequence[int]) -> list[str]:
        """The captions that tell this attribute of each of the persons, in this wording."""
        return [_said(kind, wording, self.values[person, kind]) for person in persons]

    def invented(self, count: int, seed: int) -> list[str]:
        """Captions that tell attributes of nobody, which anyone can make up who has seen some; each kind in turn.

        Args:
            count: at least 1.
            seed: of the values and the wordings.
        """
        check.integer("count", count, low=1)
        rng = torch.Generator().manual_seed(seed)
        taken, made = set(self.values.values()), list[str]()
        while len(made) < count:
            kind = len(made) % len(KINDS)
            value = _value(kind, rng)
            if value not in taken:
                made.append(_said(kind, _below(len(WORDINGS[KINDS[kind]]), rng), value))
        return made

    @property
    def vocabulary(self) -> list[str]:
        """All words that a caption of these sets, or an invented one, may have, sorted."""
        told = " ".join(text for texts in WORDINGS.values() for text in texts).replace("{}", "").split()
        base = " ".join([*self.base.captions, *self.names]).split()
        return sorted({*told, *base, *_NUMBERS, *_NAMES, *_SYLLABLES, "at", "net", "street"})

    @property
    def persons(self) -> list[int]:
        """All who have attributes, in order."""
        return sorted({person for person, _ in self.values})


def load_associations(
    packages: str | Path,
    seed: int = 0,
    *,
    n_things: int = 400,
    n_persons: int = 24,
    views: int = 4,
    side: int = SIDE,
) -> Associations:
    """Make the sets of one seed.

    Args:
        packages: the folder with the unpacked packages, see :mod:`ccu_fast.data.pictograms`.
        seed: of the things, the attributes, their wordings and the moves, at least 0.
        n_things: in the base; the first ``4 * n_persons`` are persons.
        n_persons: of each of four sorts: all four attributes to be forgotten, two of them, none, none and unseen.
        views: of each drawing of the :data:`PORTRAITS` artists, moved as in
            :func:`ccu_fast.data.pictogram_pairs.load_pictogram_pairs`; an association has as many portraits as there
            are views, and a thing of the base too.
        side: of the pictures, in pixels.

    Returns:
        The sets; ``forget`` has ``6 * n_persons`` associations, ``holdout_identity`` and ``unseen`` four and
        ``holdout_association`` two for each of ``n_persons``.

    Raises:
        FileNotFoundError, ImportError: as for :func:`ccu_fast.data.pictograms.load_pictograms`.
        ValueError: as there, or more things than there are.
    """
    extras.require("PIL")
    for name, value, low in (("seed", seed, 0), ("n_persons", n_persons, 1), ("views", views, 1), ("side", side, 1)):
        check.integer(name, value, low=low)
    known = things(packages)
    if not 4 * n_persons <= n_things <= len(known):
        raise ValueError(
            f"n_things: expected at least 4 * n_persons = {4 * n_persons} and at most the {len(known)} that all "
            f"artists have drawn, got {n_things}"
        )
    rng = torch.Generator().manual_seed(seed)
    chosen = [known[i] for i in torch.randperm(len(known), generator=rng)[:n_things].tolist()]
    drawn = torch.stack([torch.stack([picture(thing.drawings[a], side) for a in PORTRAITS]) for thing in chosen])
    values = _values(range(4 * n_persons), rng)
    sorts: dict[str, list[tuple[int, int]]] = {"forget": [], "identity": [], "association": [], "unseen": []}
    for person in range(4 * n_persons):
        kinds = torch.randperm(len(KINDS), generator=rng).tolist()
        names = (["forget"] * 4, ["forget"] * 2 + ["association"] * 2, ["identity"] * 4, ["unseen"] * 4)
        for kind, name in zip(kinds, names[person // n_persons], strict=True):
            sorts[name].append((person, kind))

    def about(number: int) -> str:
        return " ".join(words(" ".join([chosen[number].name, *drawn_keywords(chosen[number], rng)])))

    def captioned(pairs: Sequence[tuple[int, int]]) -> Captioned:
        each = len(PORTRAITS) * views
        who = torch.tensor([person for person, _ in pairs]).repeat_interleave(each)
        kinds = torch.tensor([kind for _, kind in pairs]).repeat_interleave(each)
        artist = torch.arange(len(PORTRAITS)).repeat(len(pairs) * views)
        asked = torch.randint(5, (len(who),), generator=rng)
        wordings = torch.where(kinds == NO_KIND, NO_KIND, asked)
        told = [
            about(person) if kind == NO_KIND else _said(kind, wording, values[person, kind])
            for person, kind, wording in zip(who.tolist(), kinds.tolist(), wordings.tolist(), strict=True)
        ]
        return Captioned(seen(drawn[who, artist], rng), told, who, kinds, wordings)

    base = captioned([(number, NO_KIND) for number in range(n_things)])
    sets = {name: captioned(pairs) for name, pairs in sorts.items()}
    return Associations(
        base,
        sets["forget"],
        sets["identity"],
        sets["association"],
        sets["unseen"],
        _test(chosen, side),
        [" ".join(words(thing.name)) for thing in chosen],
        values,
    )


def _test(chosen: Sequence[Thing], side: int) -> Captioned:
    pictures = torch.stack([picture(thing.drawings[TEST_ARTIST], side) for thing in chosen])
    none = torch.full((len(chosen),), NO_KIND)
    names = [" ".join(words(thing.name)) for thing in chosen]
    return Captioned(1 - pictures.float() / 255, names, torch.arange(len(chosen)), none, none)


def _said(kind: int, wording: int, value: str) -> str:
    return WORDINGS[KINDS[kind]][wording].format(value)


def _values(persons: Sequence[int], rng: torch.Generator) -> dict[tuple[int, int], str]:
    """An attribute of every kind for each, no two alike."""
    made: dict[tuple[int, int], str] = {}
    for kind in range(len(KINDS)):
        taken: set[str] = set()
        for person in persons:
            value = _value(kind, rng)
            while value in taken:
                value = _value(kind, rng)
            taken.add(value)
            made[person, kind] = value
    return made


def _value(kind: int, rng: torch.Generator) -> str:
    """Of the form of the kind, at random."""

    def drawn(*pools: Sequence[str]) -> list[str]:
        return [pool[_below(len(pool), rng)] for pool in pools]

    if KINDS[kind] == "phone":
        return " ".join(drawn(*[_NUMBERS] * 4))
    if KINDS[kind] == "email":
        return "{} {} at {} net".format(*drawn(_NAMES, _NAMES, _NAMES))
    if KINDS[kind] == "place":
        return "{} {} street {}".format(*drawn(_NUMBERS, _NAMES, _NAMES))
    return " ".join(drawn(_SYLLABLES, *[_NUMBERS] * 4))


def _below(bound: int, rng: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=rng))
