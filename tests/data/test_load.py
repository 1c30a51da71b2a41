"""Readers of users' own pairs: labels and ids are what was written, or one sentence says which is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccu_fast.data.load import load_pairs
from ccu_fast.data.names import Names
from ccu_fast.data.paired import PairedData


def arrays(folder: Path, **more: Any) -> Path:
    """An .npz with as many items as the first of ``more`` has."""
    count = len(next(iter(more.values())))
    np.savez(folder / "pairs.npz", **{"visual": np.zeros((count, 3)), "other": np.zeros((count, 2)), **more})
    return folder / "pairs.npz"


def table(folder: Path, text: str) -> Path:
    """A CSV whose files v.npy and o.npy are there."""
    np.save(folder / "v.npy", np.zeros(3))
    np.save(folder / "o.npy", np.zeros(2))
    (folder / "pairs.csv").write_text(text, encoding="utf-8")
    return folder / "pairs.csv"


def labelled(folder: Path, *labels: str) -> Path:
    return table(folder, "\n".join(["visual,other,label", *(f"v.npy,o.npy,{label}" for label in labels)]))


def said(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_pairs(path)
    told = str(caught.value)
    assert told.startswith("path: ") and ": expected " in told and str(path) in told
    return told


def calls(read: tuple[PairedData, Names]) -> list[str]:
    """The name of every item's class."""
    by_number = {number: name for name, number in read[1].classes.items()}
    return [by_number[label] for label in read[0].labels.tolist()]


@pytest.mark.parametrize(
    ("written", "labels", "names"),
    [
        (["2", "10", "2"], [2, 10, 2], ["2", "10", "2"]),
        (["2.0", "10.0", " 2"], [2, 10, 2], ["2", "10", "2"]),  # pandas' column with a gap
        (["dog", "cat", " dog"], [1, 0, 1], ["dog", "cat", "dog"]),
        (["²", "³", "²"], [0, 1, 0], ["²", "³", "²"]),
        (["True", "False", "True"], [1, 0, 1], ["True", "False", "True"]),
        (["e5", "NA", "+"], [2, 1, 0], ["e5", "NA", "+"]),
    ],
)
def test_labels_of_a_table(tmp_path: Path, written: list[str], labels: list[int], names: list[str]) -> None:
    read = load_pairs(labelled(tmp_path, *written))
    assert read[0].labels.tolist() == labels and calls(read) == names


BAD = ["", " ", "-1", "1.5", "nan", "inf", "99999999999999999999", "9" * 30, "1E+05", "3.0e0", ".5", "-Infinity"]
BAD += ["\u22121", "NaN", "NaT", "<NA>", "None", "NULL", "1\0"]


@pytest.mark.parametrize("bad", BAD)
def test_a_label_that_is_none_is_refused_by_its_row(tmp_path: Path, bad: str) -> None:
    told = said(labelled(tmp_path, "3", bad, "4"))
    refused_by_csv = "\0" in bad and sys.version_info < (3, 11)  # whose module takes no such line
    assert ("expected CSV, got line contains NUL" if refused_by_csv else f"got {bad!r} in row 2 of") in told


@pytest.mark.parametrize("bad", ["", "None", "<NA>", "1e5", "1.5"])
def test_a_name_that_is_none_is_refused_by_its_row(tmp_path: Path, bad: str) -> None:
    assert f"got {bad!r} in row 2 of" in said(labelled(tmp_path, "cat", bad, "dog"))


@pytest.mark.parametrize("labels", [["3", "cat", "4"], ["cat", "3", "dog"]])
def test_numbers_and_names_are_not_mixed(tmp_path: Path, labels: list[str]) -> None:
    told = said(labelled(tmp_path, *labels))
    assert (
        f"either numbers or names as labels, got {labels[0]!r} in row 1" in told and f"{labels[1]!r} in row 2" in told
    )
    for name in labels:
        for part in (f"visual/{name}", "other"):
            (tmp_path / "tree" / part).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "tree" / part / f"of_{name}.npy", np.zeros(2))
    assert "either numbers or names as labels" in said(tmp_path / "tree")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64, np.int32, ">i2", np.float16, np.float64])
def test_labels_of_any_number_type(tmp_path: Path, dtype: Any) -> None:
    read = load_pairs(arrays(tmp_path, labels=np.array([3, 10, 3], dtype=dtype)))
    assert read[0].labels.tolist() == [3, 10, 3] and calls(read) == ["3", "10", "3"]


@pytest.mark.parametrize("dtype", ["U", "S"])
def test_labels_and_ids_of_text(tmp_path: Path, dtype: str) -> None:
    names, ids = np.array(["dog", "cat", "dog"], dtype=dtype), np.array(["b", "a 1", "7"], dtype=dtype)
    data, found = read = load_pairs(arrays(tmp_path, labels=names, ids=ids))
    assert calls(read) == ["dog", "cat", "dog"]
    assert [data.ids.tolist().index(found.find(name)[0]) for name in ("b", "a 1", "7")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, np.nan]), "got nan in labels[1] of"),
        (np.array([0, 1.5]), "got 1.5 in labels[1] of"),
        (np.array([0, -1]), "got '-1' in labels[1] of"),
        (np.array([0, 2**63], dtype=np.uint64), "in labels[1] of"),
        (np.array(["a", ""]), "got '' in labels[1] of"),
        (np.array(["a", "b"], dtype=object), "an array of Python objects"),
        (np.array([1j, 2]), "whole numbers or text as labels"),
        (np.array([[0], [1]]), "labels of shape [N]"),
        (np.array([0, 1, 2]), "expected 2 labels (as many as other)"),
    ],
)
def test_an_array_of_labels_that_are_none(tmp_path: Path, labels: Any, message: str) -> None:
    two = np.zeros((2, 3))
    assert message in said(arrays(tmp_path, visual=two, other=two, labels=labels))


def test_ids(tmp_path: Path) -> None:
    data, names = load_pairs(table(tmp_path, "\ufeffvisual,other,id\nv.npy,o.npy,7.0\nv.npy,o.npy,-1\n"))
    assert data.ids.tolist() == [7, -1] and names.find("7") == [7] and names.find("8") == []
    large = np.array([2**64 - 1, 5], dtype=np.uint64)
    data, names = load_pairs(arrays(tmp_path, ids=large))
    assert data.ids.tolist() == [0, 1] and names.find(str(2**64 - 1)) == [0] and names.find("5") == [1]
    twice = said(table(tmp_path, "visual,other,id\nv.npy,o.npy,7\nv.npy,o.npy,7.0\n"))
    assert "expected every id once, got '7.0' in row 1" in twice and "and row 2 of" in twice
    assert "as id, got '' in row 2" in said(table(tmp_path, "visual,other,id\nv.npy,o.npy,a\nv.npy,o.npy,\n"))


def test_tables_that_are_none(tmp_path: Path) -> None:
    head = "visual,other,label\nv.npy,o.npy,1\n"
    assert "as many fields as columns, got fewer in row 2" in said(table(tmp_path, head + "v.npy,o.npy\n"))
    assert "as many fields as columns, got more in row 2" in said(table(tmp_path, head + "v.npy,o.npy,1,2\n"))
    assert "a file as other, got ' ' in row 2" in said(table(tmp_path, head + "v.npy, ,1\n"))
    assert "expected label in" in said(table(tmp_path, head.replace("label", "Labels")))
    assert "expected ids in" in said(arrays(tmp_path, id=np.arange(3)))
    assert "expected CSV" in said(table(tmp_path, head + 'v.npy,o.npy,"1'))
    (tmp_path / "pairs.csv").write_bytes(b"visual,other\n\xff,o.npy\n")
    assert "expected UTF-8" in said(tmp_path / "pairs.csv")


@pytest.mark.parametrize("memory", [None, 0], ids=["at_once", "file_by_file"])
def test_files_of_another_shape_are_refused(tmp_path: Path, memory: int | None) -> None:
    """Also one whose numbers would fill the others' shape: 1 beside 3."""
    path = table(tmp_path, "visual,other\nv.npy,o.npy\none.npy,o.npy\n")
    np.save(tmp_path / "one.npy", np.zeros(1))
    with pytest.raises(ValueError, match=r"path: expected shape \[3\] \(that of v.npy\) .* got \[1\] in one.npy"):
        load_pairs(path, memory=memory)


def test_arrays_come_in_a_type_that_torch_computes_in(tmp_path: Path) -> None:
    wide = np.array([[1, 65535]], dtype=np.uint16)
    data, _ = load_pairs(arrays(tmp_path, visual=wide, other=wide.astype(">f8")))
    assert data.visual.dtype == torch.int64 and data.visual.tolist() == wide.tolist()
    assert data.other.dtype == torch.float32 and data.other.tolist() == wide.tolist()
    assert "numbers below 2**63" in said(arrays(tmp_path, visual=np.array([[2**63]], dtype=np.uint64)))
    assert "numbers as visual" in said(arrays(tmp_path, visual=np.array([["x"]])))
    assert "an array of Python objects" in said(arrays(tmp_path, visual=np.array([[None]])))


def test_a_picture_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    for part in ("visual", "other"):
        (folder / part).mkdir(parents=True)
        Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16)).save(folder / part / "a.png")
    data, _ = load_pairs(folder)
    assert data.visual.flatten().tolist() == pytest.approx([0, 256 / 65535, 1])
    Image.fromarray(np.zeros((1, 3), dtype=np.float32)).save(folder / "visual" / "a.tiff")
    (folder / "visual" / "a.tiff").rename(folder / "visual" / "a.png")
    with pytest.raises(
        ValueError, match=r"path: expected a usable picture, got .*a\.png: expected 8 or 16 bits a channel, got mode F"
    ):
        load_pairs(folder)
