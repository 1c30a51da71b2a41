"""A dataset that was protected in memory, written by the writer of all others."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ccu_fast.data.captions.listing import MANIFEST, Listing, is_text
from ccu_fast.files import new_folder
from ccu_fast.mem.fidelity import noise_report
from ccu_fast.mem.protection import Protected
from ccu_fast.mem.publish.writer import Publisher
from ccu_fast.runs.provenance import versions


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    Raises:
        FileExistsError: ``target`` exists and is not an empty folder.
        OSError: nothing can be renamed to it; see :func:`ccu_fast.files.new_folder`.
    """
    target = new_folder(Path(target))
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # mkdtemp makes it private; what is published has the rights any new folder would have.
        mask = os.umask(0)
        os.umask(mask)
        work.chmod(0o777 & ~mask)
        yield work
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


class _Memory:
    """What is published, as the writer asks for it; the originals are not kept, only their distance (the noise)."""

    def __init__(self, protected: Protected, listing: Listing) -> None:
        self.listing, self._protected = listing, protected
        self.image_shape = cast("tuple[int, int, int]", tuple(protected.images.shape[1:]))

    def images(self, index: Tensor) -> Tensor:
        return self._protected.images[index]

    published_images = images

    def published_captions(self, rows: Tensor) -> list[str]:
        return [self._protected.captions[row] for row in rows.tolist()]

    def each(self, work: Callable[[int], None], n: int) -> None:
        for number in range(n):
            work(number)


def export(protected: Protected, out: str | Path, *, seed: int | None = None) -> Path:
    """Write ``images/00000.png`` …, ``captions.csv`` (columns ``images,caption``) and ``manifest.json`` into ``out``.

    The folder appears complete or not at all; an interruption leaves nothing behind.

    Args:
        protected: grey (1 channel) or RGB (3 channels) images.
        out: a new or empty folder.
        seed: recorded in the manifest.

    Returns:
        ``out`` as a path.

    Raises:
        FileExistsError: ``out`` has contents.
        OSError: ``out`` cannot be written, or is a mount point.
        ValueError: images of another number of channels, a caption that UTF-8 cannot hold.

    >>> import tempfile
    >>> images, noise = torch.full((2, 1, 4, 4), 9, dtype=torch.uint8), torch.ones(2, 1, 4, 4, dtype=torch.int8)
    >>> method, no_triggers = ccu_fast.mem.Method.parse("em"), torch.zeros(2, 0, dtype=torch.int64)
    >>> made = ccu_fast.mem.Protected(method, ccu_fast.mem.Settings(), images, noise, no_triggers, ["one", "two"])
    >>> sorted(path.name for path in ccu_fast.mem.export(made, tempfile.mkdtemp()).iterdir())
    ['captions.csv', 'images', 'manifest.json']
    """
    out = Path(out)
    n, channels = protected.images.shape[:2]
    if channels not in (1, 3):
        raise ValueError(f"protected: expected images of 1 or 3 channels, got {channels}")
    for number, caption in enumerate(protected.captions):
        if not is_text(caption):
            raise ValueError(f"protected: expected captions of text, got half of a surrogate pair in caption {number}")
    names = [f"images/{i:05d}.png" for i in range(n)]
    listing = Listing("csv", out, names, names, protected.captions, torch.arange(n), list(range(n)))
    made = _Memory(protected, listing)
    with atomic_folder(out) as folder, tempfile.TemporaryDirectory(prefix=".", dir=folder) as work:
        publisher = Publisher(made, made, folder, Path(work), range(n))
        publisher.write()
        with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("images", "caption"), *zip(names, protected.captions, strict=True)])
        manifest = {
            "method": asdict(protected.method),
            "settings": asdict(protected.settings),
            "seed": seed,
            "versions": versions("ccu_fast", "torch"),
            **noise_report(protected.noise),
            "losses": protected.losses,
            "sha256": publisher.hashes,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return out
