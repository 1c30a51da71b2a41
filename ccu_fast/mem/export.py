"""Write a protected dataset: lossless PNGs, the captions, a manifest. All of it or nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.mem.protection import Protected
from ccu_fast.runs.cache import versions
from ccu_fast.runs.provenance import file_hash

CAPTIONS = "captions.csv"
MANIFEST = "manifest.json"
IMAGES = "images"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    Raises:
        FileExistsError: ``target`` exists and is not an empty folder.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"out: expected a new or empty folder, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
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
        ValueError: images of another number of channels.

    >>> import tempfile
    >>> images, noise = torch.full((2, 1, 4, 4), 9, dtype=torch.uint8), torch.ones(2, 1, 4, 4, dtype=torch.int8)
    >>> method, no_triggers = ccu_fast.mem.Method.parse("em"), torch.zeros(2, 0, dtype=torch.int64)
    >>> made = ccu_fast.mem.Protected(method, ccu_fast.mem.Settings(), images, noise, no_triggers, ["one", "two"])
    >>> sorted(path.name for path in ccu_fast.mem.export(made, tempfile.mkdtemp()).iterdir())
    ['captions.csv', 'images', 'manifest.json']
    """
    out = Path(out)
    channels = protected.images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"protected: expected images of 1 or 3 channels, got {channels}")
    with atomic_folder(out) as folder:
        (folder / IMAGES).mkdir()
        names = [f"{IMAGES}/{i:05d}.png" for i in range(len(protected.images))]
        hashes = {}
        for name, image in zip(names, protected.images, strict=True):
            _picture(image).save(folder / name, optimize=False)
            hashes[name] = file_hash(folder / name)
        with (folder / CAPTIONS).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["images", "caption"])
            writer.writerows(zip(names, protected.captions, strict=True))
        manifest = {
            "method": asdict(protected.method),
            "settings": asdict(protected.settings),
            "seed": seed,
            "versions": versions("ccu_fast", "torch"),
            "eps_255": noise_size(protected.noise),
            "psnr_db": psnr(protected.noise),
            "losses": protected.losses,
            "sha256": hashes,
        }
        text = json.dumps(manifest, indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return out


def noise_size(noise: Tensor) -> int:
    """The largest change of a pixel, in 1/255."""
    check.tensor("noise", noise, dtypes=(torch.int8,))
    return int(noise.short().abs().max()) if noise.numel() else 0


def psnr(noise: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB over all images; None when there is no noise."""
    mean_square = float(noise.double().square().mean()) if noise.numel() else 0.0
    return None if mean_square == 0 else float(10 * torch.log10(torch.tensor(255.0**2 / mean_square)))


def _picture(image: Tensor) -> Any:
    from PIL import Image

    array = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
