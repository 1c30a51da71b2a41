"""Files in SALMUBench's layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ccu_fast.data.salmubench import SPLITS, read_split
from tests.support.salmubench_files import SIZES, write_salmubench

SHAPE = (3, 8, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_salmubench(tmp_path / "bench")


def test_every_row_of_every_shard_is_read_in_order(folder: Path) -> None:
    assert set(SPLITS) == set(SIZES)
    for split, size in SIZES.items():
        found = read_split(folder, split, SHAPE)
        assert len(found) == len(found.captions) == size and found.pictures.shape == (size, *SHAPE)
        colours = [(40 * i + 9 * len(split)) % 256 for i in range(size)]
        assert found.pictures[:, 0, 0, 0].tolist() == colours
        assert [name.rpartition("_")[2] for name in found.files] == [f"{i}.png" for i in range(size)]
    retain = read_split(folder, "retain_synth", SHAPE)
    assert retain.identities == ["forget0", None] * 3
    assert retain.where(lambda who: who is None).captions == [f"A plain picture {i}" for i in (1, 3, 5)]


def test_some_rows_are_drawn(folder: Path) -> None:
    some, again, other = (read_split(folder, "forget", SHAPE, most=3, seed=seed) for seed in (1, 1, 2))
    assert len(some) == 3 and some.captions == again.captions != other.captions
    assert set(some.captions) < set(read_split(folder, "forget", SHAPE).captions)
    assert len(read_split(folder, "forget", SHAPE, most=100)) == SIZES["forget"]


def test_what_is_no_such_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"split: expected .*forget.*got 'train'"):
        read_split(folder, "train", SHAPE)
    with pytest.raises(FileNotFoundError, match=r"folder: expected data/forget-\*.parquet in .*, got none"):
        read_split(folder / "data", "forget", SHAPE)
    (shard, second) = sorted((folder / "data").glob("forget-*"))
    rows = parquet.read_table(shard)
    parquet.write_table(rows.drop_columns(["text"]), shard)
    with pytest.raises(ValueError, match=r"00000-of-00002.parquet: expected the columns .*, got none called text"):
        read_split(folder, "forget", SHAPE)
    shutil.copy(second, shard)
    broken = rows.to_pylist()
    broken[1]["image"]["bytes"] = b"no picture"
    parquet.write_table(pa.Table.from_pylist(broken, rows.schema), shard)
    with pytest.raises(ValueError, match=r"row 1: expected a usable picture, got not a picture"):
        read_split(folder, "forget", SHAPE)
    shard.write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"00000-of-00002.parquet: expected Parquet, got "):
        read_split(folder, "forget", SHAPE)
