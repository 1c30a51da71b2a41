"""A protected WebDataset shard: the keys, captions and metadata of the input, lossless pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from ccu_fast.data.captions.listing import in_place_of
from ccu_fast.data.captions.shards import Sample, read_index, read_span
from ccu_fast.files import json_text

KEPT = ("json", "cls")


def write_shard(
    source: Path,
    target: Path,
    samples: Iterable[tuple[str, bytes, list[str]]],
    size: tuple[int, int],
    caption_column: str = "caption",
) -> dict[str, int]:
    """Write (key, PNG, captions) in their order; ``json`` and ``cls`` members are taken over.

    Other members are not: an unprotected thumbnail or embedding would give away what the picture hides. In the json,
    ``caption`` and the field that the captions came from become the published ones, and ``sha256``, ``width``,
    ``height`` those of the PNG, where present; ``size`` is (width, height).

    Returns:
        How many members of each extension were left out.
    """
    dropped: Counter[str] = Counter()
    index = read_index(source)
    with target.open("wb") as file, writer(file) as archive:
        for key, png, captions in samples:
            sample = next(sample for sample in index if sample.key == key)
            archive.write(published(source, sample, png, captions, size, caption_column))
            taken = {*KEPT, "txt", *sample.pictures}
            dropped.update(extension for extension in sample.members if extension not in taken)
    return dict(dropped)


def writer(file: BinaryIO) -> Any:
    """A ``TarWriter`` that gives the same bytes for the same input: no time, no user."""
    from webdataset import TarWriter

    options: Any = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": "PAX_FORMAT"}
    return TarWriter(file, encoder=False, **options)


def published(
    shard: Path, sample: Sample, png: bytes, captions: list[str], size: tuple[int, int], caption_column: str = "caption"
) -> dict[str, Any]:
    """What is written in the place of a sample, as webdataset takes it.

    Raises:
        ValueError: the sample's ``json`` is none.
    """
    written: dict[str, Any] = {"__key__": sample.key, "png": png}
    if "txt" in sample.members:
        written["txt"] = captions[0].encode()
    for extension in KEPT:
        if extension in sample.members:
            data = read_span(shard, *sample.members[extension])
            if extension == "json":
                data = _about(data, captions, {"caption", caption_column}, png, size)
            written[extension] = data
    return written


def _about(data: bytes, captions: list[str], fields: set[str], png: bytes, size: tuple[int, int]) -> bytes:
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json is no JSON ({error})") from error
    if isinstance(about, dict):
        new: dict[str, Any] = {"sha256": sha256(png).hexdigest(), "width": size[0], "height": size[1]}
        new |= {name: in_place_of(about.get(name), captions) for name in fields}
        about.update({name: value for name, value in new.items() if name in about})
    return json_text(about).encode()
