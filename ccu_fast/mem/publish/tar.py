"""A protected WebDataset shard: the keys, captions and metadata of the input, lossless pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from ccu_fast.data.captions.shards import read_index, read_span
from ccu_fast.data.pictures import EXTENSIONS

KEPT = ("json", "cls")


def write_shard(
    source: Path, target: Path, samples: Iterator[tuple[str, bytes, str]], size: tuple[int, int]
) -> dict[str, int]:
    """Write (key, PNG, caption) in their order; ``json`` and ``cls`` members are taken over.

    Other members are not: an unprotected thumbnail or embedding would give away what the picture hides. In the json,
    ``caption`` becomes the published caption, and ``sha256``, ``width``, ``height`` those of the PNG, where present;
    ``size`` is (width, height).

    Returns:
        How many members of each extension were left out.
    """
    from webdataset import TarWriter

    dropped: Counter[str] = Counter()
    index = read_index(source)
    # The same input gives the same bytes: no time, no user.
    with target.open("wb") as file:
        options: Any = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": "PAX_FORMAT"}
        with TarWriter(file, encoder=False, **options) as archive:
            for key, png, caption in samples:
                members = next(sample.members for sample in index if sample.key == key)
                written: dict[str, Any] = {"__key__": key, "png": png, "txt": caption.encode()}
                for extension, span in members.items():
                    if extension == "json":
                        written["json"] = _about(read_span(source, *span), caption, png, size)
                    elif extension in KEPT:
                        written[extension] = read_span(source, *span)
                    elif extension != "txt" and extension not in EXTENSIONS:
                        dropped[extension] += 1
                archive.write(written)
    return dict(dropped)


def _about(data: bytes, caption: str, png: bytes, size: tuple[int, int]) -> bytes:
    about = json.loads(data)
    if isinstance(about, dict):
        new = {"caption": caption, "sha256": sha256(png).hexdigest(), "width": size[0], "height": size[1]}
        about.update({name: value for name, value in new.items() if name in about})
    return json.dumps(about, ensure_ascii=False).encode()
