"""Users' own pairs: arrays, a CSV table, or a folder; pictures with captions. None of them needs labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccu_fast import extras
from ccu_fast.data.captions import DiskSource, Options, list_pairs
from ccu_fast.data.captions.listing import visible_files
from ccu_fast.data.captions.tables import read_records
from ccu_fast.data.names import Names, read_ids, read_labels, texts
from ccu_fast.data.paired import PairedData
from ccu_fast.data.pictures import BadPicture, is_picture, read_pixels
from ccu_fast.files import readable


def load_pairs(path: str | Path) -> tuple[PairedData, Names]:
    """Items in two modalities from disk, and what their classes and the items are called.

    - ``pairs.npz``: arrays ``visual`` [N, …] and ``other`` [N, …], optionally ``labels`` [N] and ``ids`` [N], which are
      whole numbers of any dtype or text.
    - ``pairs.csv``: a header with ``visual`` and ``other``, optionally ``label`` and ``id``; the first two name files,
      relative to the table's folder.
    - a folder: ``visual/`` and ``other/`` with files of the same names, extensions aside, in sorted order; in
      subfolders of ``visual/`` the folder's name is the class. An item's id is its position.

    A file is a ``.npy`` array or an image (its pixels become fp32 in [0, 1], ``[channels, height, width]``). Every
    file of one modality has one shape. Class names are numbered in sorted order, ids that are names by position; whole
    numbers (3, also written 3.0) stay.

    Raises:
        ValueError: nothing there; columns or arrays missing; files without partner; differing shapes; a label that is
            missing, negative or a fraction; numbers and names as labels together; an id that is missing or repeated.
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
) -> tuple[PairedData, Names]:
    """Pictures and captions from disk, in memory, one item for each caption.

    Args:
        path: see :func:`ccu_fast.data.captions.list_pairs`.
        shape: (C, H, W) of the model; see :func:`ccu_fast.data.pictures.decode`.
        encode: captions → token ids ``[N, L]``.
        options: how to read the dataset.

    Returns:
        The items, without labels: ``visual`` uint8 ``[N, C, H, W]``, ``other`` token ids, ids 0 … N−1 in the order of
        the dataset. An item's names are its id and the file of its picture.

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
    root = Path(path) if Path(path).is_dir() else Path(path).parent
    files: dict[str, list[int]] = {}
    for item, number in enumerate(listing.image_of.tolist()):
        files.setdefault(os.path.normpath(root / listing.files[number]), []).append(item)
    data = PairedData(pictures[listing.image_of], encode(listing.captions))
    return data, Names({}, _positions(data), files, root)


def _from_arrays(path: Path) -> tuple[PairedData, Names]:
    with readable(path, "path"):
        arrays = np.load(path, allow_pickle=False)
        names = arrays.files
    with arrays:
        chosen = _chosen(names, ("visual", "other", "labels", "ids"), path)
        with readable(path, "path"):
            found = {name: _array(arrays, name) for name in chosen}
    for name, array in found.items():
        if array is None:
            kind = "numbers" if name in ("visual", "other") else "numbers or text"
            raise ValueError(f"path: expected {kind} as {name} in {path}, got an array of Python objects")
    visual, other = (_tensor(found[name], name, path) for name in ("visual", "other"))
    written = {name: texts(array, name, path) for name, array in found.items() if name in ("labels", "ids")}
    return _paired(visual, other, written, path, lambda name, row: f"{name}[{row}] of {path}")


def _array(arrays: Any, name: str) -> Any:
    """An array of a file; None for one of Python objects, which is a pickle."""
    try:
        return arrays[name]
    except ValueError as error:
        if "allow_pickle" in str(error):
            return None
        raise


def _from_table(path: Path) -> tuple[PairedData, Names]:
    try:
        rows = list(read_records(path))
    except ValueError as error:
        raise ValueError(f"path: {error}") from error
    if not rows:
        raise ValueError(f"path: expected at least one row in {path}, got none")
    columns = _chosen([name for name in rows[0] if name is not None], ("visual", "other", "label", "id"), path)

    def where(_: str, number: int) -> str:
        return f"row {number + 1} of {path}"

    for number, row in enumerate(rows):
        if None in row or None in row.values():
            more = "more" if None in row else "fewer"
            raise ValueError(f"path: expected as many fields as columns, got {more} in {where('', number)}")
        for name in ("visual", "other"):
            if not row[name].strip():
                raise ValueError(f"path: expected a file as {name}, got {row[name]!r} in {where('', number)}")
    visual, other = (_stack([path.parent / row[name] for row in rows], name) for name in ("visual", "other"))
    written = {f"{name}s": [row[name] for row in rows] for name in ("label", "id") if name in columns}
    return _paired(visual, other, written, path, where)


def _chosen(found: Iterable[str], known: Sequence[str], path: Path) -> list[str]:
    """The arrays or columns of a file that are read.

    Raises:
        ValueError: visual or other is missing; one is spelt nearly like a known one and would be left out unseen.
    """
    found = list(found)
    missing = [name for name in ("visual", "other") if name not in found]
    if missing:
        raise ValueError(f"path: expected visual and other in {path}, got no {' and no '.join(missing)}")
    plain = {name.rstrip("s"): name for name in known}
    for name in found:
        meant = plain.get(name.strip().lower().rstrip("s"))
        if meant is not None and name != meant:
            raise ValueError(f"path: expected {meant} in {path}, got {name!r}")
    return [name for name in known if name in found]


def _from_folder(path: Path) -> tuple[PairedData, Names]:
    found = {name: _by_stem(path / name) for name in ("visual", "other")}
    alone = sorted(set(found["visual"]) ^ set(found["other"]))
    if alone:
        raise ValueError(f"path: expected each name in visual/ and in other/ of {path}, got only one of {alone[0]!r}")
    names = sorted(found["visual"])
    visual, other = (_stack([found[which][name] for name in names], which) for which in ("visual", "other"))
    classes = [found["visual"][name].parent for name in names]
    inside = [folder for folder in classes if folder != path / "visual"]
    if inside and len(inside) < len(classes):
        lonely = found["visual"][names[classes.index(path / "visual")]]
        raise ValueError(f"path: expected every file of visual/ in the folder of a class, got {lonely} in none")
    written = {"labels": [folder.name for folder in classes]} if inside else {}
    return _paired(visual, other, written, path, lambda _, row: str(found["visual"][names[row]]))


def _paired(
    visual: Tensor, other: Tensor, written: Mapping[str, Sequence[str]], path: Path, where: Callable[[str, int], str]
) -> tuple[PairedData, Names]:
    """The items of a reader, and their names.

    Args:
        written: "labels" and "ids", if there are any, as text.
        path: of the data.
        where: (one of these, row) → its place.
    """
    labels, ids = None, None
    classes: dict[str, int] = {}
    items: dict[str, list[int]] = {}
    for name, values in written.items():
        if len(values) != len(other):
            raise ValueError(f"path: expected {len(other)} {name} (as many as other) in {path}, got {len(values)}")
    if not len(other):
        raise ValueError(f"path: expected at least one item in {path}, got none")
    if "labels" in written:
        labels, classes = read_labels(written["labels"], partial(where, "labels"))
    if "ids" in written:
        ids, items = read_ids(written["ids"], partial(where, "ids"))
    try:
        data = PairedData(visual, other, labels, ids)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"path: {error} (in {path})") from error
    return data, Names(classes, items or _positions(data))


def _positions(data: PairedData) -> dict[str, list[int]]:
    return {str(item): [item] for item in data.ids.tolist()}


def _by_stem(folder: Path) -> dict[str, Path]:
    files = sorted(
        p for p in map(folder.joinpath, visible_files(folder)) if p.suffix.lower() == ".npy" or is_picture(p.name)
    )
    if not files:
        raise ValueError(f"path: expected .npy files or images in {folder}, got none")
    named: dict[str, Path] = {}
    for file in files:
        if file.stem in named:
            raise ValueError(f"path: expected every name once in {folder}, got {file.stem!r} twice")
        named[file.stem] = file
    return named


def _stack(files: Sequence[Path], name: str) -> Tensor:
    items = [_read(file, name) for file in files]
    for file, item in zip(files, items, strict=True):
        if item.shape != items[0].shape:
            raise ValueError(
                f"path: expected shape {list(items[0].shape)} (that of {files[0].name}) in every file, got "
                f"{list(item.shape)} in {file.name}"
            )
    return torch.stack(items)


def _read(file: Path, name: str) -> Tensor:
    if not file.is_file():
        raise ValueError(f"path: expected a file {file}, got none")
    if file.suffix.lower() == ".npy":
        with readable(file, "path"):
            array = np.load(file, allow_pickle=False)
        return _tensor(array, name, file)
    extras.require("PIL")
    try:
        return read_pixels(file.read_bytes())
    except BadPicture as error:
        raise ValueError(f"path: expected a usable picture, got {file}: {error}") from error


def _tensor(array: np.ndarray, name: str, path: Path) -> Tensor:
    """The array in a dtype that torch computes in."""
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"path: expected numbers as {name} in {path}, got {array.dtype}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "u" and array.dtype != np.uint8:  # torch has no arithmetic of the larger ones
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"path: expected numbers below 2**63 as {name} in {path}, got {array.max()}")
        array = array.astype(np.int64)
    if array.dtype == np.float64:
        array = array.astype(np.float32)  # what towers compute in
    return torch.from_numpy(np.ascontiguousarray(array))
