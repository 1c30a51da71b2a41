"""A protected WebDataset shard: the keys, captions and metadata of the input, lossless pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import md5, sha256, sha512
from pathlib import Path
from typing import Any, BinaryIO

from ccu_fast.data.captions.listing import in_place_of, texts_in
from ccu_fast.data.captions.shards import Sample, read_index, read_json, read_span
from ccu_fast.files import json_text
from ccu_fast.mem.publish.elsewhere import NAMES, Clean, Elsewhere

KEPT = ("json", "cls")
HASHES = {"md5": md5, "sha256": sha256, "sha512": sha512}  # that img2dataset writes of a picture


def write_shard(
    source: Path,
    target: Path,
    samples: Iterable[tuple[str, bytes, tuple[int, int], Mapping[str, str]]],
    elsewhere: Elsewhere,
    caption_column: str = "caption",
) -> dict[str, int]:
    """Write (key, PNG, (width, height), captions) in their order; ``json`` and ``cls`` members are taken over.

    Other members are not: an unprotected thumbnail or embedding would give away what the picture hides. In the json,
    ``caption`` and the field that the captions came from become the published ones, and ``width``, ``height`` and the
    hashes those of the PNG, where present. Captions are clean → published.

    Returns:
        How many members of each extension were left out.
    """
    dropped: Counter[str] = Counter()
    index = {sample.key: sample for sample in reversed(list(read_index(source)))}
    with target.open("wb") as file, writer(file) as archive:
        for key, png, size, captions in samples:
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
    new = list(captions.values())
    about = read_json(shard, sample) if "json" in sample.members else None
    fields = {}
    if isinstance(about, dict):
        fields = {name: about[name] for name in ("caption", caption_column) if texts_in(about.get(name))}
    written_over = {f"json.{name}": texts_in(value) for name, value in fields.items()}
    if "txt" in sample.members:
        written["txt"] = new[0].encode()
        written_over["txt"] = [read_span(shard, *sample.members["txt"]).decode("utf-8-sig", "replace")]
    # Where captions came from one of these, the others hold further ones, which may stand elsewhere too.
    known = {caption.strip() for caption in captions}
    others = [(name, text) for name, texts in written_over.items() for text in texts if text.strip() not in known]
    for name, text in others:
        elsewhere.put(text, name)
    clean = Clean(captions, (text for _, text in others))
    elsewhere.look(sample.key, clean, NAMES)
    if "json" in sample.members:
        in_fields = {name: in_place_of(value, new) for name, value in fields.items()}
        written["json"] = json_text(_about(about, in_fields, clean, png, size, elsewhere)).encode()
    if "cls" in sample.members:
        written["cls"] = _class(read_span(shard, *sample.members["cls"]), clean, elsewhere)
    return written


def _about(
    about: Any, captions: dict[str, Any], clean: Clean, png: bytes, size: tuple[int, int], elsewhere: Elsewhere
) -> Any:
    if not isinstance(about, dict):
        return elsewhere.renew(about, clean, "json")
    new: dict[str, Any] = {name: make(png).hexdigest() for name, make in HASHES.items() if name in about}
    new |= {name: number for name, number in zip(("width", "height"), size, strict=True) if name in about}
    new |= captions
    rest = {name: value for name, value in about.items() if name not in new}
    renewed = iter(elsewhere.renew(rest, clean, "json").items())
    return dict((name, new[name]) if name in new else next(renewed) for name in about)  # in their order


def _class(data: bytes, clean: Clean, elsewhere: Elsewhere) -> bytes:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data
    renewed = elsewhere.renew(text, clean, "cls")
    return data if renewed == text else str(renewed).encode()
