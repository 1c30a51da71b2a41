"""Inputs that stay on a disk are those that memory would hold, are read by the batch, and are refused once changed."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ccu_fast.data import load
from ccu_fast.data.captions import Options
from ccu_fast.data.disk_rows import ArrayRows, DiskRows
from ccu_fast.data.load import load_captions, load_pairs
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.provenance import items_hash, tensors_hash
from tests.support import mem_datasets

N = 23
SOME = torch.tensor([4, 5, 6, 1, 22, 0])


def arrays(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    return {
        "visual": numbers.integers(0, 250, (N, 3, 4)).astype(dtype),
        "other": numbers.normal(size=(N, 5)).astype(np.float32),
        "labels": np.arange(N) % 3,
        "ids": np.arange(N) + 100,
    }


def written(folder: Path, layout: str, found: dict[str, np.ndarray]) -> Path:
    """The arrays in one of the layouts of load_pairs."""
    if layout == "npz":
        np.savez(folder / "pairs.npz", **found)
        return folder / "pairs.npz"
    if layout == "npy":
        for name, array in found.items():
            np.save(folder / f"{name}.npy", array)
        return folder
    lines = ["visual,other,label,id"]
    for i in range(N):
        for name in ("visual", "other"):
            np.save(folder / f"{name}{i}.npy", found[name][i])
        lines.append(f"visual{i}.npy,other{i}.npy,{found['labels'][i]},{found['ids'][i]}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def same(one: PairedData, other: PairedData) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("visual", "other", "labels", "ids")]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("layout", ["npz", "npy", "table"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">i4", np.float16, np.float64])
def test_rows_are_those_that_memory_would_hold(tmp_path: Path, layout: str, dtype: Any) -> None:
    path = written(tmp_path, layout, arrays(dtype))
    held, names = load_pairs(path)
    disk, again = load_pairs(path, memory=0)
    assert disk.on_disk and not held.on_disk and names == again
    assert isinstance(disk.visual, DiskRows) and isinstance(disk.other, DiskRows)
    assert disk.visual.shape == held.visual.shape and disk.visual.nbytes == held.visual.nbytes
    assert same(disk.in_memory(), held) and same(disk.batch(SOME), held.batch(SOME))
    # A part of a part, in an order of its own; a mask.
    assert same(disk.select(SOME).select(torch.tensor([3, 0])).in_memory(), held.batch(SOME[[3, 0]]))
    assert same(disk[disk.labels == 1].in_memory(), held[held.labels == 1])
    assert [len(part) for part in disk.visual.split(10)] == [10, 10, 3]
    assert torch.equal(torch.cat(list(disk.other.split(10))), held.other)
    assert items_hash(disk) == items_hash(held)
    part, kept = disk.select(SOME), held.batch(SOME)
    assert items_hash(part) == items_hash(kept)
    # What has room is held.
    size = held.visual.nbytes + held.other.nbytes
    assert not load_pairs(path, memory=size)[0].on_disk and load_pairs(path, memory=size - 1)[0].on_disk
    assert same(load_pairs(path, memory=size)[0], held)


def test_files_that_memory_can_hold_are_not_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "table", arrays())
    read, items, most = load._read, [], []

    def watched(file: Path, name: str) -> Tensor:
        item = read(file, name)
        items.append(weakref.ref(item))
        most.append(sum(each() is not None for each in items))
        return item

    monkeypatch.setattr(load, "_read", watched)
    assert not load_pairs(path, memory=10**6)[0].on_disk
    assert len(most) == 2 * 2 * N and max(most) <= 3  # two first ones, whose form the others are to have


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy_has_rows(tmp_path: Path, version: tuple[int, int]) -> None:
    array = arrays()["visual"]
    with (tmp_path / "visual.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    assert torch.equal(DiskRows(ArrayRows(tmp_path / "visual.npy"))[SOME], torch.from_numpy(array)[SOME])


@pytest.mark.filterwarnings("error")
def test_a_file_is_closed_with_the_last_selection(tmp_path: Path) -> None:
    np.save(tmp_path / "visual.npy", arrays()["visual"])
    rows = ArrayRows(tmp_path / "visual.npy")
    file, last = rows._file, DiskRows(rows).select(SOME)
    del rows
    assert not file.closed and len(last[:]) == len(SOME)
    del last
    assert file.closed


def test_what_has_no_rows_is_read_whole(tmp_path: Path) -> None:
    found = arrays()
    np.savez_compressed(tmp_path / "pairs.npz", **found)
    held, _ = load_pairs(tmp_path / "pairs.npz", memory=0)
    assert not held.on_disk and torch.equal(held.visual, torch.from_numpy(found["visual"]))
    (tmp_path / "columns").mkdir()
    by_column, _ = load_pairs(
        written(tmp_path / "columns", "npy", found | {"visual": np.asfortranarray(found["visual"])}), memory=0
    )
    assert not by_column.on_disk and torch.equal(by_column.visual, held.visual)
    np.save(tmp_path / "columns" / "other.npy", np.array([["x"]] * N))
    with pytest.raises(ValueError, match="path: expected numbers as other in"):
        load_pairs(tmp_path / "columns", memory=0)


@pytest.mark.parametrize("write", [mem_datasets.write_csv, mem_datasets.write_imagefolder, mem_datasets.write_shards])
def test_pictures_are_decoded_by_the_batch_and_once(tmp_path: Path, write: Any, monkeypatch: Any) -> None:
    path = write(tmp_path / "in")

    def encode(captions: Any) -> Tensor:
        return torch.tensor([[len(text), ord(text[-1])] for text in captions])

    held, _ = load_captions(path, (3, 16, 16), encode, Options())
    disk, _ = load_captions(path, (3, 16, 16), encode, Options(), memory=0)
    assert isinstance(disk.visual, DiskRows) and isinstance(disk.other, Tensor)
    assert same(disk.in_memory(), held) and items_hash(disk) == items_hash(held)
    # Seven captions of six pictures: what would be held is a picture for each caption.
    size = len(held) * 3 * 16 * 16
    for memory, on_disk in ((size - 1, True), (size, False)):
        assert load_captions(path, (3, 16, 16), encode, Options(), memory=memory)[0].on_disk == on_disk
    source: Any = disk.visual.source
    decoded: list[int] = []
    images = source._source.images
    monkeypatch.setattr(source._source, "images", lambda index: (decoded.extend(index.tolist()), images(index))[1])
    first = source._source.image_of[0]
    of_first = (source._source.image_of == first).nonzero()[:, 0]
    assert torch.equal(disk.visual[of_first], held.visual[of_first]) and decoded == [int(first)]


def test_each_row_is_read_once_for_all_hashes_of_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = load_pairs(written(tmp_path, "npy", arrays()), memory=0)
    read: list[int] = []
    rows = ArrayRows.rows
    monkeypatch.setattr(ArrayRows, "rows", lambda self, index: (read.append(len(index)), rows(self, index))[1])
    seen: list[tuple[str, int, int]] = []
    first = items_hash(data, lambda stage, done, total, note: seen.append((stage, done, total)))
    assert items_hash(data) == first and sum(read) == 2 * N and seen[-1] == ("reading the data", 2 * N, 2 * N)
    assert isinstance(data.visual, DiskRows)
    assert data.visual.digests().shape == (N, 32) and data.visual.select(SOME).digests().any(1).all()
    assert sum(read) == 2 * N


def test_pieces_of_a_hash_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ccu_fast.runs import provenance

    data, _ = load_pairs(written(tmp_path, "npy", arrays()), memory=0)
    whole = tensors_hash({"x": data.visual})
    sizes: list[int] = []
    monkeypatch.setattr(provenance, "READ", 5 * data.visual.nbytes // N)
    assert tensors_hash({"x": data.visual}, sizes.append) == whole and sizes == [5, 5, 5, 5, 3]


def test_a_row_that_changes_is_refused(tmp_path: Path) -> None:
    found = arrays()
    data, _ = load_pairs(written(tmp_path, "npy", found), memory=0)
    part = data.select(SOME)
    items_hash(part)
    found["visual"][[5, 7]] += 1
    with (tmp_path / "visual.npy").open("r+b") as file:  # the file that is open, not a new one
        np.save(file, found["visual"])
    assert len(part.batch(torch.tensor([0]))) == 1 and len(data.batch(torch.tensor([7]))) == 1  # not read before
    for again in (part, data):  # all parts know what was read
        with pytest.raises(
            ValueError, match="expected inputs that stay as they are during a run, got a changed one in"
        ):
            again.batch(torch.arange(6))
    with (tmp_path / "visual.npy").open("r+b") as file:
        file.truncate(400)
    with pytest.raises(ValueError, match=r"visual.npy: expected 23 rows, got a file that ends in row 2[12]"):
        data.batch(torch.tensor([21, 22]))
