"""A protected WebDataset shard: the keys, captions and metadata of the input, lossless pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from ccu_fast.data.captions.shards import Sample, read_index, read_span
from ccu_fast.files import json_text

KEPT = ("json", "cls")


def write_shard(
    source: Path, target: Path, samples: Iterable[tuple[str, bytes, str]], size: tuple[int, int]
) -> dict[str, int]:
    """Write (key, PNG, caption) in their order; ``json`` and ``cls`` members are taken over.

    Other members are not: an unprotected thumbnail or embedding would give away what the picture hides. In the json,
    ``caption`` becomes the published caption, and ``sha256``, ``width``, ``height`` those of the PNG, where present;
    ``size`` is (width, height).

    Returns:
        How many members of each extension were left out.
    """
    dropped: Counter[str] = Counter()
    index = read_index(source)
    with target.open("wb") as file, writer(file) as archive:
        for key, png, caption in samples:
            sample = next(sample for sample in index if sample.key == key)
            archive.write(published(source, sample, png, caption, size))
            taken = {*KEPT, "txt", *sample.pictures}
            dropped.update(extension for extension in sample.members if extension not in taken)
    return dict(dropped)


def writer(file: BinaryIO) -> Any:
    """A ``TarWriter`` that gives the same bytes for the same input: no time, no user."""
    from webdataset import TarWriter

    options: Any = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": "PAX_FORMAT"}
    return TarWriter(file, encoder=False, **options)


def published(shard: Path, sample: Sample, png: bytes, caption: str, size: tuple[int, int]) -> dict[str, Any]:
    """What is written in the place of a sample, as webdataset takes it.

    Raises:
        ValueError: the sample's ``json`` is none.
    """
    written: dict[str, Any] = {"__key__": sample.key, "png": png, "txt": caption.encode()}
    for extension in KEPT:
        if extension in sample.members:
            data = read_span(shard, *sample.members[extension])
            written[extension] = _about(data, caption, png, size) if extension == "json" else data
    return written


def _about(data: bytes, caption: str, png: bytes, size: tuple[int, int]) -> bytes:
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json is no JSON ({error})") from error
    if isinstance(about, dict):
        new = {"caption": caption, "sha256": sha256(png).hexdigest(), "width": size[0], "height": size[1]}
        about.update({name: value for name, value in new.items() if name in about})
    return json_text(about).encode()
