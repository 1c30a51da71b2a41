"""Users' own pairs: arrays, a CSV table, or a folder; pictures with captions. None of them needs labels."""

from __future__ import annotations

import math
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
from ccu_fast.data.disk_rows import ArrayRows, DiskRows, as_tensor, inside_archive
from ccu_fast.data.names import Names, read_ids, read_labels, texts
from ccu_fast.data.paired import PairedData
from ccu_fast.data.pictures import BadPicture, is_picture, read_pixels
from ccu_fast.files import readable


def load_pairs(path: str | Path, memory: int | None = None) -> tuple[PairedData, Names]:
    """Items in two modalities from disk, and what their classes and the items are called.

    - ``pairs.npz``: arrays ``visual`` [N, …] and ``other`` [N, …], optionally ``labels`` [N] and ``ids`` [N], which are
      whole numbers of any dtype or text.
    - a folder with the same arrays in ``visual.npy``, ``other.npy``, ``labels.npy`` and ``ids.npy``.
    - ``pairs.csv``: a header with ``visual`` and ``other``, optionally ``label`` and ``id``; the first two name files,
      relative to the table's folder.
    - a folder: ``visual/`` and ``other/`` with files of the same names, extensions aside, in sorted order; in
      subfolders of ``visual/`` the folder's name is the class. An item's id is its position.

    A file is a ``.npy`` array or an image (its pixels become fp32 in [0, 1], ``[channels, height, width]``). Every
    file of one modality has one shape. Class names are numbered in sorted order, ids that are names by position; whole
    numbers (3, also written 3.0) stay.

    Args:
        path: of the items.
        memory: bytes. Where visual and other inputs together take more, they stay on the disk and are read by the batch
            (:class:`~ccu_fast.data.disk_rows.DiskRows`); a compressed ``.npz`` and arrays in Fortran order, which have
            no rows that could be read alone, are read whole all the same. None: no bound.

    Raises:
        ValueError: nothing there; columns or arrays missing; files without partner; differing shapes; a label that is
            missing, negative or a fraction; numbers and names as labels together; an id that is missing or repeated.
        ImportError: an image without pillow.
    """
    path = Path(path)
    if path.is_dir():
        arrays = (path / "visual.npy").is_file() and not (path / "visual").is_dir()
        return (_from_npy if arrays else _from_folder)(path, memory)
    if path.suffix == ".npz" and path.is_file():
        return _from_npz(path, memory)
    if path.suffix == ".csv" and path.is_file():
        return _from_table(path, memory)
    raise ValueError(f"path: expected an existing folder, .npz or .csv file, got {path}")


def load_captions(
    path: str | Path,
    shape: tuple[int, int, int],
    encode: Callable[[Sequence[str]], Tensor],
    options: Options | None = None,
    memory: int | None = None,
) -> tuple[PairedData, Names]:
    """Pictures and captions from disk, one item for each caption.

    Args:
        path: see :func:`ccu_fast.data.captions.list_pairs`.
        shape: (C, H, W) of the model; see :func:`ccu_fast.data.pictures.decode`.
        encode: captions → token ids ``[N, L]``.
        options: how to read the dataset.
        memory: bytes; where the decoded pictures, one for each caption, take more, they stay on the disk and each is
            decoded when a batch has it. Captions are held as token ids. None: no bound.

    Returns:
        The items, without labels: ``visual`` uint8 ``[N, C, H, W]``, ``other`` token ids, ids 0 … N−1 in the order of
        the dataset. An item's names are its id and the file of its picture.

    Raises:
        FileNotFoundError: nothing there.
        BadData, BadPicture: a row, or a picture, that cannot be used; a picture on the disk is looked at when it is
            first read.
        ValueError: no pairs, or columns missing.
        ImportError: pillow is not installed.
    """
    extras.require("PIL")
    listing = list_pairs(path, options, "path").whole()
    visual: Any
    if _too_much(memory, len(listing.captions) * math.prod(shape)):  # held, a picture is there for each of its captions
        visual = DiskRows(_Pictures(DiskSource(listing, shape)))
    else:
        with closing(DiskSource(listing, shape)) as source:
            visual = source.images(torch.arange(source.n_images))[listing.image_of]
    root = Path(path) if Path(path).is_dir() else Path(path).parent
    files: dict[str, list[int]] = {}
    for item, number in enumerate(listing.image_of.tolist()):
        files.setdefault(os.path.normpath(root / listing.files[number]), []).append(item)
    data = PairedData(visual, encode(listing.captions))
    return data, Names({}, _positions(data), files, root)


class _Pictures:
    """The picture of each caption, decoded when it is asked for; one of several captions once a batch."""

    dtype = torch.uint8

    def __init__(self, source: DiskSource) -> None:
        self._source, self.name = source, f"{source.listing.argument}: {source.listing.root}"
        self.shape: tuple[int, ...] = (len(source.image_of), *source.image_shape)

    def rows(self, index: Tensor) -> Tensor:
        numbers, place = self._source.image_of[index].unique(return_inverse=True)
        return self._source.images(numbers)[place]


class _Files:
    """A file a row; each is looked at once, so that what cannot be read is known at the start."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self._files, self._name, self.name = files, name, f"path: {files[0].parent}"
        first = _read(files[0], name)
        self.shape, self.dtype = (len(files), *first.shape), first.dtype
        for file in files[1:]:
            item = _read(file, name)
            _check_shape(item, first, file, files[0])
            self.dtype = torch.promote_types(self.dtype, item.dtype)

    def rows(self, index: Tensor) -> Tensor:
        found = torch.empty((len(index), *self.shape[1:]), dtype=self.dtype)
        for place, number in enumerate(index.tolist()):  # one file at a time: all rows may be just what memory can hold
            found[place] = _read(self._files[number], self._name)
        return found


def _too_much(memory: int | None, size: int) -> bool:
    return memory is not None and size > memory


def _from_npz(path: Path, memory: int | None) -> tuple[PairedData, Names]:
    with readable(path, "path"):
        arrays = np.load(path, allow_pickle=False)
        names = arrays.files
    with arrays:
        chosen = _chosen(names, ("visual", "other", "labels", "ids"), path)
        with readable(path, "path"):
            rows: dict[str, DiskRows] | None = None
            if memory is not None and (starts := inside_archive(path, ("visual", "other"))) is not None:
                rows = _rows({name: (path, start) for name, start in starts.items()}, memory)
            found = {
                name: _array(partial(arrays.__getitem__, name)) for name in chosen if rows is None or name not in rows
            }
    return _from_arrays(found, rows, path)


def _from_npy(path: Path, memory: int | None) -> tuple[PairedData, Names]:
    files = {file.stem: file for file in sorted(path.glob("*.npy"))}
    chosen = _chosen(files, ("visual", "other", "labels", "ids"), path)
    found, rows = {}, None
    if memory is not None:
        rows = _rows({name: (files[name], 0) for name in ("visual", "other")}, memory)
    for name in chosen:
        if rows is None or name not in rows:
            with readable(files[name], "path"):
                found[name] = _array(partial(np.load, files[name], allow_pickle=False))
    return _from_arrays(found, rows, path)


def _rows(places: Mapping[str, tuple[Path, int]], memory: int) -> dict[str, DiskRows] | None:
    """The arrays as rows on the disk; None where memory has room for them, or they are no rows."""
    try:
        rows = {name: DiskRows(ArrayRows(*place)) for name, place in places.items()}
    except ValueError:  # said, if it is an error, by who reads them whole
        return None
    return rows if _too_much(memory, sum(each.nbytes for each in rows.values())) else None


def _from_arrays(found: Mapping[str, Any], rows: dict[str, DiskRows] | None, path: Path) -> tuple[PairedData, Names]:
    for name, array in found.items():
        if array is None:
            kind = "numbers" if name in ("visual", "other") else "numbers or text"
            raise ValueError(f"path: expected {kind} as {name} in {path}, got an array of Python objects")
    inputs: Any = rows or {name: as_tensor(found[name], name, path) for name in ("visual", "other")}
    written = {name: texts(array, name, path) for name, array in found.items() if name in ("labels", "ids")}
    return _paired(inputs["visual"], inputs["other"], written, path, lambda name, row: f"{name}[{row}] of {path}")


def _array(read: Callable[[], Any]) -> Any:
    """An array of a file; None for one of Python objects, which is a pickle."""
    try:
        return read()
    except ValueError as error:
        if "allow_pickle" in str(error):
            return None
        raise


def _from_table(path: Path, memory: int | None) -> tuple[PairedData, Names]:
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
    visual, other = _inputs({name: [path.parent / row[name] for row in rows] for name in ("visual", "other")}, memory)
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


def _from_folder(path: Path, memory: int | None) -> tuple[PairedData, Names]:
    found = {name: _by_stem(path / name) for name in ("visual", "other")}
    alone = sorted(set(found["visual"]) ^ set(found["other"]))
    if alone:
        raise ValueError(f"path: expected each name in visual/ and in other/ of {path}, got only one of {alone[0]!r}")
    names = sorted(found["visual"])
    visual, other = _inputs({which: [files[name] for name in names] for which, files in found.items()}, memory)
    classes = [found["visual"][name].parent for name in names]
    inside = [folder for folder in classes if folder != path / "visual"]
    if inside and len(inside) < len(classes):
        lonely = found["visual"][names[classes.index(path / "visual")]]
        raise ValueError(f"path: expected every file of visual/ in the folder of a class, got {lonely} in none")
    written = {"labels": [folder.name for folder in classes]} if inside else {}
    return _paired(visual, other, written, path, lambda _, row: str(found["visual"][names[row]]))


def _inputs(files: Mapping[str, Sequence[Path]], memory: int | None) -> Any:
    """The visual and the other inputs of files."""
    if memory is None:
        return [_stack(of_one, name) for name, of_one in files.items()]
    rows = [DiskRows(_Files(of_one, name)) for name, of_one in files.items()]
    if _too_much(memory, sum(each.nbytes for each in rows)):
        return rows
    return [each[:] for each in rows]


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
        _check_shape(item, items[0], file, files[0])
    return torch.stack(items)


def _check_shape(item: Tensor, first: Tensor, file: Path, first_file: Path) -> None:
    if item.shape != first.shape:
        raise ValueError(
            f"path: expected shape {list(first.shape)} (that of {first_file.name}) in every file, got "
            f"{list(item.shape)} in {file.name}"
        )


def _read(file: Path, name: str) -> Tensor:
    if not file.is_file():
        raise ValueError(f"path: expected a file {file}, got none")
    if file.suffix.lower() == ".npy":
        with readable(file, "path"):
            array = np.load(file, allow_pickle=False)
        return as_tensor(array, name, file)
    extras.require("PIL")
    try:
        return read_pixels(file.read_bytes())
    except BadPicture as error:
        raise ValueError(f"path: expected a usable picture, got {file}: {error}") from error
