"""Users' own pairs: arrays, a CSV table, or a folder; pictures with captions. None of them needs labels."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccu_fast import extras
from ccu_fast.data.captions import DiskSource, Options, list_pairs
from ccu_fast.data.paired import PairedData
from ccu_fast.files import readable

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def load_pairs(path: str | Path) -> PairedData:
    """Items in two modalities from disk.

    - ``pairs.npz``: arrays ``visual`` [N, …] and ``other`` [N, …], optionally ``labels`` [N] and ``ids`` [N].
    - ``pairs.csv``: a header with ``visual`` and ``other``, optionally ``label`` and ``id``; the first two name files,
      relative to the table's folder.
    - a folder: ``visual/`` and ``other/`` with files of the same names, extensions aside, in sorted order; in
      subfolders of ``visual/`` the folder's name is the class. An item's id is its position.

    A file is a ``.npy`` array or an image (uint8 pixels become fp32 in [0, 1], ``[channels, height, width]``). Every
    file of one modality has one shape. Class names are numbered in sorted order; labels that are whole numbers stay.

    Raises:
        ValueError: nothing there, columns or arrays missing, files without partner, differing shapes, repeated ids.
        ImportError: an image without pillow.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _from_arrays(path)
    if path.suffix == ".csv" and path.is_file():
        return _from_table(path)
    raise ValueError(f"path: expected an existing folder, .npz or .csv file, got {path}")


def load_captions(
    path: str | Path,
    shape: tuple[int, int, int],
    encode: Callable[[Sequence[str]], Tensor],
    options: Options | None = None,
) -> tuple[PairedData, list[str]]:
    """Pictures and captions from disk, in memory, one item for each caption.

    Args:
        path: see :func:`ccu_fast.data.captions.list_pairs`.
        shape: (C, H, W) of the model; see :func:`ccu_fast.data.pictures.decode`.
        encode: captions → token ids ``[N, L]``.
        options: how to read the dataset.

    Returns:
        The items, without labels: ``visual`` uint8 ``[N, C, H, W]``, ``other`` token ids, ids 0 … N−1 in the order of
        the dataset. For each item the file of its picture.

    Raises:
        FileNotFoundError: nothing there.
        BadData, BadPicture: a row, or a picture, that cannot be used.
        ValueError: no pairs, or columns missing.
        ImportError: pillow is not installed.
    """
    extras.require("PIL")
    listing = list_pairs(path, options, "path").whole()
    with closing(DiskSource(listing, shape)) as source:
        pictures = source.images(torch.arange(source.n_images))
    files = [listing.files[number] for number in listing.image_of.tolist()]
    return PairedData(pictures[listing.image_of], encode(listing.captions)), files


def _from_arrays(path: Path) -> PairedData:
    with readable(path, "path"), np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in ("visual", "other", "labels", "ids") if name in arrays}
    missing = [name for name in ("visual", "other") if name not in found]
    if missing:
        raise ValueError(f"path: expected arrays visual and other in {path}, got no {' and no '.join(missing)}")
    for name in ("labels", "ids"):
        if name in found and not np.issubdtype(found[name].dtype, np.integer):
            raise ValueError(f"path: expected whole numbers as {name} in {path}, got {found[name].dtype}")
    return PairedData(
        _tensor(found["visual"]),
        _tensor(found["other"]),
        *(torch.from_numpy(found[n].astype(np.int64)) if n in found else None for n in ("labels", "ids")),  # type: ignore[arg-type]
    )


def _from_table(path: Path) -> PairedData:
    with readable(path, "path"), path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        rows = list(reader)
    missing = [name for name in ("visual", "other") if name not in columns]
    if missing:
        raise ValueError(f"path: expected columns visual and other in {path}, got no {' and no '.join(missing)}")
    if not rows:
        raise ValueError(f"path: expected at least one row in {path}, got none")
    visual, other = (_stack([path.parent / row[name] for row in rows]) for name in ("visual", "other"))
    ids = None
    if "id" in columns:
        try:
            ids = torch.tensor([int(row["id"]) for row in rows])
        except (ValueError, TypeError) as error:
            raise ValueError(f"path: expected whole numbers in the column id of {path} ({error})") from error
    labels = _numbered([row["label"] for row in rows]) if "label" in columns else None
    return PairedData(visual, other, labels, ids)  # type: ignore[arg-type]


def _from_folder(path: Path) -> PairedData:
    found = {name: _by_stem(path / name) for name in ("visual", "other")}
    alone = sorted(set(found["visual"]) ^ set(found["other"]))
    if alone:
        raise ValueError(f"path: expected each name in visual/ and in other/ of {path}, got only one of {alone[0]!r}")
    names = sorted(found["visual"])
    visual, other = (_stack([found[which][name] for name in names]) for which in ("visual", "other"))
    classes = [found["visual"][name].parent for name in names]
    labels = None if classes[0] == path / "visual" else _numbered([folder.name for folder in classes])
    return PairedData(visual, other, labels)  # type: ignore[arg-type]


def _by_stem(folder: Path) -> dict[str, Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".npy", *IMAGES))
    if not files:
        raise ValueError(f"path: expected .npy files or images in {folder}, got none")
    named: dict[str, Path] = {}
    for file in files:
        if file.stem in named:
            raise ValueError(f"path: expected every name once in {folder}, got {file.stem!r} twice")
        named[file.stem] = file
    return named


def _stack(files: Sequence[Path]) -> Tensor:
    items = [_read(file) for file in files]
    for file, item in zip(files, items, strict=True):
        if item.shape != items[0].shape:
            raise ValueError(
                f"path: expected shape {list(items[0].shape)} (that of {files[0].name}) in every file, got "
                f"{list(item.shape)} in {file.name}"
            )
    return torch.stack(items)


def _read(file: Path) -> Tensor:
    if not file.is_file():
        raise ValueError(f"path: expected a file {file}, got none")
    if file.suffix.lower() == ".npy":
        with readable(file, "path"):
            return _tensor(np.load(file, allow_pickle=False))
    extras.require("PIL")
    from PIL import Image

    with Image.open(file) as image:
        pixels = np.array(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB"))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == np.float64:
        array = array.astype(np.float32)  # what towers compute in
    return torch.from_numpy(np.ascontiguousarray(array))


def _numbered(names: Sequence[str]) -> Tensor:
    if all(name.isdigit() for name in names):
        return torch.tensor([int(name) for name in names])
    order = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([order[name] for name in names])
