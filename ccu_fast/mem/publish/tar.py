"""A protected WebDataset shard: the keys, captions and metadata of the input, lossless pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import md5, sha256, sha512
from pathlib import Path
from typing import Any, BinaryIO

from ccu_fast.data.captions.listing import in_place_of
from ccu_fast.data.captions.shards import Sample, read_index, read_span
from ccu_fast.files import json_text
from ccu_fast.mem.publish.elsewhere import NAMES, Elsewhere

KEPT = ("json", "cls")
HASHES = {"md5": md5, "sha256": sha256, "sha512": sha512}  # that img2dataset writes of a picture


def write_shard(
    source: Path,
    target: Path,
    samples: Iterable[tuple[str, bytes, Mapping[str, str]]],
    size: tuple[int, int],
    elsewhere: Elsewhere,
    caption_column: str = "caption",
) -> dict[str, int]:
    """Write (key, PNG, captions) in their order; ``json`` and ``cls`` members are taken over.

    Other members are not: an unprotected thumbnail or embedding would give away what the picture hides. In the json,
    ``caption`` and the field that the captions came from become the published ones, and ``width``, ``height`` and the
    hashes those of the PNG, where present; ``size`` is (width, height). Captions are clean → published.

    Returns:
        How many members of each extension were left out.
    """
    dropped: Counter[str] = Counter()
    index = {sample.key: sample for sample in reversed(list(read_index(source)))}
    with target.open("wb") as file, writer(file) as archive:
        for key, png, captions in samples:
            sample = index[key]
            archive.write(published(source, sample, png, captions, size, elsewhere, caption_column))
            taken = {*KEPT, "txt", *sample.pictures}
            dropped.update(extension for extension in sample.members if extension not in taken)
    return dict(dropped)


def writer(file: BinaryIO) -> Any:
    """A ``TarWriter`` that gives the same bytes for the same input: no time, no user."""
    from webdataset import TarWriter

    options: Any = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": "PAX_FORMAT"}
    return TarWriter(file, encoder=False, **options)


def published(
    shard: Path,
    sample: Sample,
    png: bytes,
    captions: Mapping[str, str],
    size: tuple[int, int],
    elsewhere: Elsewhere,
    caption_column: str = "caption",
) -> dict[str, Any]:
    """What is written in the place of a sample, as webdataset takes it.

    Raises:
        ValueError: the sample's ``json`` is none.
    """
    written: dict[str, Any] = {"__key__": sample.key, "png": png}
    first = next(iter(captions.values()))
    elsewhere.look(sample.key, captions, NAMES)
    if "txt" in sample.members:
        written["txt"] = first.encode()
        # Where captions come from a field of the json, this is another one, and may stand in further fields.
        old = read_span(shard, *sample.members["txt"]).decode("utf-8-sig", "replace")
        if old.strip() and old not in captions:
            elsewhere.replaced["txt"] += 1
            captions = {**captions, old: first}
    for extension in KEPT:
        if extension in sample.members:
            data = read_span(shard, *sample.members[extension])
            if extension == "json":
                data = _about(data, captions, {"caption", caption_column}, png, size, elsewhere)
            else:
                data = _class(data, captions, elsewhere)
            written[extension] = data
    return written


def _about(
    data: bytes,
    captions: Mapping[str, str],
    fields: set[str],
    png: bytes,
    size: tuple[int, int],
    elsewhere: Elsewhere,
) -> bytes:
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json is no JSON ({error})") from error
    new: dict[str, Any] = {}
    if isinstance(about, dict):
        named = {name: about[name] for name in sorted(fields & about.keys())}
        published = list(captions.values())
        for name, value in named.items():
            others = [text for text in _texts_within(value) if text.strip() and text not in captions]
            elsewhere.replaced.update({f"json.{name}": len(others)} if others else {})
            captions = {**dict.fromkeys(others, published[0]), **captions}
            new[name] = _all_published(value, published)
        new |= {name: make(png).hexdigest() for name, make in HASHES.items() if name in about}
        new |= {name: number for name, number in zip(("width", "height"), size, strict=True) if name in about}
        rest = {name: value for name, value in about.items() if name not in new}
        renewed = iter(elsewhere.renew(rest, captions, "json").items())
        about = dict((name, new[name]) if name in new else next(renewed) for name in about)  # in their order
    else:
        about = elsewhere.renew(about, captions, "json")
    return json_text(about).encode()


def _texts_within(value: Any) -> list[str]:
    """All texts in a nest of lists and dicts."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _texts_within(item)]


def _all_published(value: Any, captions: list[str]) -> Any:
    """A field of captions with published ones; of a dict, of languages say, the first in the place of every text."""
    if isinstance(value, dict):
        return {key: _all_published(item, captions[:1]) for key, item in value.items()}
    return in_place_of(value, captions)


def _class(data: bytes, captions: Mapping[str, str], elsewhere: Elsewhere) -> bytes:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data
    renewed = elsewhere.renew(text, captions, "cls")
    return data if renewed == text else str(renewed).encode()
