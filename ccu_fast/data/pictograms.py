"""pictograms: four artists' drawings of the same 1,800 things (3,600 with skin tones), with captions that people wrote.

The drawings are those of the npm packages ``emoji-datasource-{apple,facebook,google,twitter}`` 16.0.0, names and
keywords those of ``emojibase-data`` 17.0.0. Nothing of them is part of this package: they are read from a folder into
which they were unpacked::

    npm install --prefix packages emojibase-data@17.0.0 emoji-datasource-{google,twitter,facebook,apple}@16.0.0
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.data.captions.tables import write_pairs
from ccu_fast.files import readable

# SHA-256 over the names and the SHA-256 of all files that are read of a package, in the order of their names.
ARTISTS = {
    "google": "f24a2a7d590d5032f6590c301485408465343b70ebb6646d22d802abb2bb51ef",
    "twitter": "6d4c048657123ad21bb63edd0209f5157ca22fd1d647c76a5a26185cc9f0264f",
    "facebook": "ceba37d9e4d04cb8a6cc2d844f1c6e9befdff0919cb9c0dbab1e1d3f9d7ef124",
    "apple": "c118d9d73010b624a7b55d42dc2770a52b89714e2005817a1d9f678da92031c0",
}
LANGUAGES = {
    "de": "a17c57c0ad0a9643c90752cae79d454217371485ef6d9dab7504c6cdf1ad053f",
    "en": "0abf3670e96d7d6f71e852326a6f9dfaa746de6531d819de960515819260e451",
    "es": "2f68d0d2887c3871892380a1b5dba9f9c5bf6215653abfc705762e48ae8df522",
    "fr": "9a7a46bc35b9fe9f44453e47e0db391f944693385107f1ba058732df748ce70d",
}
SIDE = 32
KEYWORDS = 3
_DRAWN = "64"  # pixels of a side, as the packages have them


@dataclass(frozen=True)
class Thing:
    """What the packages have on a thing.

    Attributes:
        name: a few words.
        category: a finer one than its group.
        keywords: in the package's order.
        group: number of its group in emojibase; None if it is in none.
        drawings: the files by artist.
    """

    name: str
    category: str
    keywords: list[str]
    group: int | None
    drawings: dict[str, Path]


@dataclass(frozen=True)
class Pictograms:
    """Drawings and their captions.

    Attributes:
        images: uint8 ``[N, 3, side, side]``, on white.
        captions: N strings of lower-case words: the thing's name, its sub-category, three of its keywords. Each
            drawing draws keywords of its own.
        things: int64 ``[N]``, which thing each is of: the same numbers in all sets of a call.
    """

    images: Tensor
    captions: list[str]
    things: Tensor

    def __len__(self) -> int:
        return len(self.images)


def load_pictograms(
    packages: str | Path,
    *,
    n_things: int = 800,
    n_test: int = 400,
    artists: Sequence[str] = ("google", "twitter"),
    test_artist: str = "facebook",
    side: int = SIDE,
    language: str = "en",
    tones: bool = False,
    seed: int = 0,
) -> tuple[Pictograms, Pictograms]:
    """Drawings of some artists to learn from, and another artist's drawings of the same things to be tested on.

    Args:
        packages: the folder with the unpacked packages, or the one with its ``node_modules``.
        n_things: how many things, drawn at random from those that all these artists have.
        n_test: of how many of them the test has the drawing.
        artists: who has drawn what is learned from; one drawing each of every thing.
        test_artist: who has drawn the test.
        side: of the pictures, in pixels (bicubic from 64).
        language: of the captions: "de", "en", "es" or "fr".
        tones: whether a person of another skin tone is another thing.
        seed: the same seed gives the same things and captions.

    Returns:
        The two sets; the first has ``n_things · len(artists)`` drawings.

    Raises:
        FileNotFoundError: a package is not there.
        ImportError: pillow is not installed.
        TypeError, ValueError: naming the argument; or a package with other contents.

    >>> train, test = load_pictograms("packages", n_things=10, n_test=5)  # doctest: +SKIP
    >>> len(train), len(test)  # doctest: +SKIP
    (20, 5)
    """
    extras.require("PIL")
    check.integer("n_things", n_things, low=1)
    check.integer("n_test", n_test, low=1)
    check.integer("side", side, low=1)
    check.integer("seed", seed, low=0)
    check.one_of("language", language, tuple(LANGUAGES))
    everybody = (*artists, test_artist)
    for name in everybody:
        check.one_of("artists" if name in artists else "test_artist", name, tuple(ARTISTS))
    if not artists or len(set(everybody)) != len(everybody):
        raise ValueError(f"artists: expected different ones, and not test_artist {test_artist!r}, got {list(artists)}")
    known = things(packages, (test_artist, *artists), language=language, tones=tones)
    if not n_test <= n_things <= len(known):
        raise ValueError(
            f"n_things: expected at least n_test {n_test} and at most the {len(known)} that all these artists have "
            f"drawn, got {n_things}"
        )
    rng = torch.Generator().manual_seed(seed)
    chosen = [known[i] for i in torch.randperm(len(known), generator=rng)[:n_things].tolist()]

    def taken(names: Sequence[str], some: list[Thing]) -> Pictograms:
        images = [picture(thing.drawings[name], side) for name in names for thing in some]
        captions = [_caption(thing, rng) for _ in names for thing in some]
        return Pictograms(torch.stack(images), captions, torch.arange(len(some)).repeat(len(names)))

    return taken(artists, chosen), taken((test_artist,), chosen[:n_test])


def write_pictograms(folder: str | Path, packages: str | Path, **options: Any) -> Path:
    """Write the two sets of :func:`load_pictograms` as CSV datasets, ``train.csv`` and ``test.csv``, with PNGs.

    Args:
        folder: made; must not exist.
        packages: as for :func:`load_pictograms`.
        options: as for :func:`load_pictograms`.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``folder`` is there.

    >>> write_pictograms("pictograms", "packages")  # doctest: +SKIP
    PosixPath('pictograms')
    """
    parts = dict(zip(("train", "test"), load_pictograms(packages, **options), strict=True))
    return write_pairs(folder, {name: (part.images, part.captions) for name, part in parts.items()})


def things(
    packages: str | Path, artists: Sequence[str] = tuple(ARTISTS), *, language: str = "en", tones: bool = False
) -> list[Thing]:
    """All things that all these artists have drawn, in the order of the first one's table.

    Args:
        packages, language, tones: as for :func:`load_pictograms`.
        artists: whose drawings; at least one.

    Raises:
        FileNotFoundError, ValueError: a package is not there, or has other contents.
    """
    folder = Path(packages)
    inner = folder / "node_modules"
    folder = inner if inner.is_dir() else folder
    texts = _texts(folder / "emojibase-data", language)
    drawn = {name: _drawings(folder / f"emoji-datasource-{name}", name, tones) for name in artists}
    codes = [code for code in drawn[artists[0]] if code in texts and all(code in files for files in drawn.values())]
    return [Thing(*texts[code], {name: files[code] for name, files in drawn.items()}) for code in codes]


def _texts(package: Path, language: str) -> dict[str, tuple[str, str, list[str], int | None]]:
    """Code → name, sub-category, keywords and group, of one language."""
    folder = package / language
    _check_contents(package, [folder / "data.json", folder / "messages.json"], LANGUAGES[language])
    groups = {group["order"]: group["message"] for group in _json(folder / "messages.json")["subgroups"]}
    texts = {}
    for about in _json(folder / "data.json"):
        for each in (about, *about.get("skins", ())):
            texts[_code(each["hexcode"])] = (
                each["label"],
                groups.get(about.get("subgroup"), ""),
                about.get("tags", []),
                about.get("group"),
            )
    return texts


def _drawings(package: Path, artist: str, tones: bool) -> dict[str, Path]:
    """Code → file, in the order of the package's table."""
    folder = package / "img" / artist / _DRAWN
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    _check_contents(package, [package / "emoji.json", *files], ARTISTS[artist])
    drawings = {}
    for about in _json(package / "emoji.json"):
        for each in (about, *(about.get("skin_variations", {}).values() if tones else ())):
            if each[f"has_img_{artist}"]:
                drawings[_code(each["unified"])] = folder / each["image"]
    return drawings


def _check_contents(package: Path, files: Sequence[Path], expected: str) -> None:
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"packages: expected the unpacked npm packages, got no {file}")
        digest.update(file.relative_to(package).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    if digest.hexdigest() != expected:
        raise ValueError(
            f"packages: expected the files of the version named in ccu_fast.data.pictograms, got others in {package}"
        )


def _json(file: Path) -> Any:
    with readable(file, "packages"):
        return json.loads(file.read_text(encoding="utf-8"))


def _code(unified: str) -> str:
    """Without the variation selectors, which one package writes and the other does not."""
    return "-".join(part for part in unified.split("-") if part != "FE0F")


def words(text: str) -> list[str]:
    """The words of a text, in lower case.

    >>> ccu_fast.data.pictograms.words("Man: red hair")
    ['man', 'red', 'hair']
    """
    return re.findall(r"\w+", text.lower())


def drawn_keywords(thing: Thing, rng: torch.Generator) -> list[str]:
    """Three of its keywords at random; all where it has fewer."""
    return [thing.keywords[i] for i in torch.randperm(len(thing.keywords), generator=rng)[:KEYWORDS].tolist()]


def _caption(thing: Thing, rng: torch.Generator) -> str:
    return " ".join(words(" ".join([thing.name, thing.category, *drawn_keywords(thing, rng)])))


def picture(file: Path, side: int) -> Tensor:
    """A drawing on white, uint8 ``[3, side, side]``."""
    from PIL import Image

    with Image.open(io.BytesIO(file.read_bytes())) as opened:
        drawn = opened.convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    white.alpha_composite(drawn)
    small = white.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
