"""The two files that the MEM authors' training code reads: noise.pt and token.pt."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.captions.dataset import DiskSource
from ccu_fast.files import new_file, reserve
from ccu_fast.mem.publish.writer import CHUNK, Published
from ccu_fast.models.clip import STD


def write_reference_files(source: DiskSource, made: Published, triggers: Tensor, folder: Path) -> None:
    """``noise.pt``: fp32 ``[rows, C, H, W]``, (published − original) / 255 / std; ``token.pt``: int64 ``[rows, n]``.

    The standard deviations are CLIP's, for grey images their mean.

    Rows, not images: the authors' code looks noise up by row. The noise is built in a temporary file that is mapped
    into memory, so the disk must hold it twice and the memory not at all.

    Args:
        source: the originals.
        made: what was published.
        triggers: int64 ``[rows, n]``.
        folder: where the files go.
    """
    image_of, shape = source.image_of, source.image_shape
    check.shape("triggers", triggers, (len(image_of), triggers.shape[1]))
    std = STD if shape[0] == len(STD) else (sum(STD) / len(STD),) * shape[0]
    divisor = torch.tensor(std).view(1, -1, 1, 1) * 255
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".noise.") as file:
        size = len(image_of) * shape[0] * shape[1] * shape[2]
        reserve(file, 4 * size)
        noise = torch.from_file(file.name, shared=True, size=size, dtype=torch.float32).view(-1, *shape)
        for rows in torch.arange(len(image_of)).split(CHUNK):
            index = image_of[rows]
            noise[rows] = (made.published_images(index).float() - source.images(index).float()) / divisor
        with new_file(folder / "noise.pt") as target:
            torch.save(noise, target)
    with new_file(folder / "token.pt") as target:
        torch.save(triggers.clone(), target)
