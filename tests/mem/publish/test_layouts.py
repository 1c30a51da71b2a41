"""Layouts that other libraries write: read, published in the same layout, and read again."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ccu_fast.data.captions import DiskSource, Listing, Options, copies, list_pairs, tables
from ccu_fast.data.load import load_pairs
from ccu_fast.mem.job import protect_dataset
from tests.support import mem_datasets as made
from tests.support.forked import in_child
from tests.support.mem_jobs import job, tree

pytestmark = pytest.mark.usefixtures("one_thread")


def shard(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            made.add_member(archive, name, data.encode() if isinstance(data, str) else data)
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def pairs_in(listing: Listing) -> list[tuple[str, str]]:
    return [(listing.names[image], caption) for image, caption in zip(listing.image_of, listing.captions, strict=True)]


def is_protected(old: str, new: str) -> bool:
    return new != old and new.endswith(old)


def published(source: Path, out: Path, **options: Any) -> tuple[Listing, Listing, dict[str, Any]]:
    """What was read, what a reader of the output gets, the manifest; every pair is protected and called as before."""
    read = Options(**options)
    before = list_pairs(source, read)
    manifest = protect_dataset(job(source, out, **({"options": read} if options else {})))
    after = list_pairs(out, read)
    assert (before.bad, after.bad, after.format) == ([], [], before.format)
    for (name, old), (new_name, new) in zip(pairs_in(before), pairs_in(after), strict=True):
        assert name == new_name and is_protected(old, new)
    shape = (3, 16, 16)
    pixels = [DiskSource(each, shape, threads=1).images(torch.arange(each.n_images)) for each in (before, after)]
    changed = (pixels[0] != pixels[1]).flatten(1).any(1)
    assert changed.all() and int((pixels[0].int() - pixels[1].int()).abs().max()) <= 16
    return before, after, manifest


# ---- hidden files


def test_files_of_an_operating_system_are_passed_over(tmp_path: Path) -> None:
    for format, write in {"folder": made.write_folder, "shards": made.write_shards, "csv": made.write_csv}.items():
        folder = tmp_path / format
        write(folder)
        beside = [".DS_Store", "._0.png", "._0.txt", "._00000.tar", "._train.csv", ".trash/9.png", "__MACOSX/9.png"]
        for name in beside:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"\0\5\x16\7")
        listing = list_pairs(folder)
        assert (listing.bad, listing.n_images) == ([], 6)
        protect_dataset(job(folder, tmp_path / f"{format}-out"))
        assert not any(
            part.startswith((".", "__")) for name in tree(tmp_path / f"{format}-out") for part in name.split("/")
        )


def test_hidden_folders_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    pairs: dict[str, bytes | str] = {}
    for i in range(4):
        pairs |= {f"./{i}.png": made.encoded(i), f"./{i}.txt": made.caption(i)}
    hidden: dict[str, bytes | str] = {}
    for at in (".git", "d/.h", "__MACOSX"):
        hidden |= {f"{at}/9.png": "x", f"{at}/9.txt": "x"}
    source = shard(tmp_path / "in" / "s.tar", hidden | pairs)
    published(source, tmp_path / "out")
    assert set(members_of(tmp_path / "out" / "s.tar")) == set(pairs)


def test_hidden_files_beside_ones_own_pairs(tmp_path: Path) -> None:
    import numpy as np

    for which in ("visual", "other"):
        (tmp_path / which).mkdir()
        for name in ("a", "b"):
            np.save(tmp_path / which / f"{name}.npy", np.ones(3, np.float32))
        (tmp_path / which / "._a.npy").write_bytes(b"\0\5\x16\7")
        (tmp_path / which / ".cache").mkdir()
        (tmp_path / which / ".cache" / "c.npy").write_bytes(b"x")
    assert len(load_pairs(tmp_path)[0].other) == 2


# ---- captions in json


def about(i: int, **more: Any) -> str:
    return json.dumps({"url": f"https://example.org/{i}", **more})


def test_captions_in_json_members(tmp_path: Path) -> None:
    """One text, a list of them, and a list beside a txt, which counts."""
    members: dict[str, bytes | str] = {}
    for i in range(4):
        members |= {f"{i}.png": made.encoded(i), f"{i}.json": about(i, caption=made.caption(i))}
    members |= {"4.png": made.encoded(4), "4.json": about(4, caption=[made.caption(4), made.caption(5)])}
    members |= {"5.png": made.encoded(5), "5.txt": made.caption(6), "5.json": about(5, caption=["secret"])}
    source = shard(tmp_path / "s.tar", members)
    before, _, _ = published(source, tmp_path / "out")
    assert before.captions == [made.caption(i) for i in range(7)]
    written = members_of(tmp_path / "out" / "s.tar")
    assert set(written) == set(members)
    fields = [json.loads(written[f"{i}.json"]) for i in range(6)]
    assert all(field["url"] == f"https://example.org/{i}" for i, field in enumerate(fields))
    assert is_protected(made.caption(2), fields[2]["caption"])
    assert [is_protected(made.caption(4 + i), text) for i, text in enumerate(fields[4]["caption"])] == [True, True]
    assert fields[5]["caption"] == [written["5.txt"].decode()]


def test_a_json_field_that_is_named(tmp_path: Path) -> None:
    """Its captions count, and a txt beside it does not keep the old one."""
    members: dict[str, bytes | str] = {}
    for i in range(4):
        fields = about(i, title=made.caption(i), caption="secret")
        members |= {f"{i}.png": made.encoded(i), f"{i}.txt": "secret", f"{i}.json": fields}
    source = shard(tmp_path / "s.tar", members)
    before, _, manifest = published(source, tmp_path / "out", caption_column="title")
    assert before.captions == [made.caption(i) for i in range(4)]
    assert manifest["columns"] == ["png", "title"]
    assert not any(
        b"secret" in data for name, data in members_of(tmp_path / "out" / "s.tar").items() if name[-3:] != "png"
    )


def test_json_without_a_caption(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i, field in enumerate(['{"caption": 3}', '{"caption": []}', '{"caption": ["a", 3]}', "[1]", "{}", "{"]):
        members |= {f"{i}.png": made.encoded(i), f"{i}.json": field}
    source = shard(tmp_path / "s.tar", members | {"6.png": made.encoded(6)})
    told = [bad.why for bad in list_pairs(source).bad]
    assert told[:5] == [f"expected a text, or a list of texts, as caption in {i}.json" for i in range(5)]
    assert told[5].startswith("its json is no JSON (") and told[6] == "no caption 6.txt or 6.json"
    (only,) = list_pairs(shard(tmp_path / "t.tar", {"0.png": made.encoded(0)}), Options(caption_column="title")).bad
    assert str(only) == "t.tar/0: no 0.json"


# ---- tables


def split(folder: Path, numbers: range, column: str, kind: str) -> None:
    folder.mkdir(parents=True)
    records = [{"file_name": f"{i}.png", column: made.caption(i)} for i in numbers]
    for i in numbers:
        (folder / f"{i}.png").write_bytes(made.encoded(i))
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", column], lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)


def test_the_splits_of_an_imagefolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split(tmp_path / "in" / "train", range(4), "text", "jsonl")
    split(tmp_path / "in" / "validation", range(4, 6), "text", "csv")
    monkeypatch.chdir(tmp_path)
    before, _, manifest = published(Path("in"), tmp_path / "out")
    assert before.format == "imagefolder"
    assert before.names == [f"train/{i}.png" for i in range(4)] + [f"validation/{i}.png" for i in (4, 5)]
    assert manifest["metadata"] == ["train/metadata.jsonl", "validation/metadata.csv"]
    assert set(tree(tmp_path / "out")) == {*before.names, *manifest["metadata"], "manifest.json", "README.md"}
    records = [json.loads(line) for line in (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()]
    assert [record["file_name"] for record in records] == [f"{i}.png" for i in range(4)]


def test_splits_that_do_not_fit_together(tmp_path: Path) -> None:
    split(tmp_path / "in" / "train", range(2), "text", "jsonl")
    split(tmp_path / "in" / "test", range(2), "caption", "csv")
    with pytest.raises(ValueError, match=r"train/metadata\.jsonl: expected the columns .*caption.* of .*, got .*text"):
        list_pairs(tmp_path / "in")
    (tmp_path / "in" / "test" / "metadata.csv").unlink()
    (tmp_path / "in" / "train" / "metadata.csv").touch()
    with pytest.raises(ValueError, match=r"expected one of .* in .*train, got metadata.csv and metadata.jsonl"):
        list_pairs(tmp_path / "in")
    (tmp_path / "in" / "train" / "metadata.csv").unlink()
    lines = [{"file_name": name, "text": "x"} for name in ("../0.png", "/0.png", "a/../../../0.png", "1.png")]
    (tmp_path / "in" / "train" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listing = list_pairs(tmp_path / "in")
    assert [bad.where for bad in listing.bad] == [f"train/metadata.jsonl, record {i}" for i in (1, 2, 3)]
    assert all("expected a path below the table's folder in file_name" in bad.why for bad in listing.bad)


def test_lists_of_captions_in_jsonl(tmp_path: Path) -> None:
    made.write_imagefolder(tmp_path / "in")
    table = tmp_path / "in" / "metadata.jsonl"
    records = [json.loads(line) for line in table.read_text().splitlines()]
    records[2]["text"] = [made.caption(20), made.caption(21)]
    table.write_text("".join(json.dumps(record) + "\n" for record in records))
    before, _, _ = published(tmp_path / "in", tmp_path / "out")
    assert before.image_of.tolist() == [0, 1, 2, 2, 3, 4, 5] and before.records == before.image_of.tolist()
    written = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [is_protected(made.caption(20 + i), text) for i, text in enumerate(written[2]["text"])] == [True, True]
    assert isinstance(written[1]["text"], str) and written[2]["boxes"] == [2, 2.5]


def parquet_imagefolder(folder: Path, n: int = 6) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i}.png").write_bytes(made.encoded(i))
    table = pyarrow.table(
        {
            "file_name": [f"{i}.png" for i in range(n)],
            "caption": [[made.caption(i), made.caption(10 + i)] if i < 2 else [made.caption(i)] for i in range(n)],
            "boxes": pyarrow.array([[i, i + 1] for i in range(n)], pyarrow.list_(pyarrow.int16())),
            "when": pyarrow.array(range(n), pyarrow.timestamp("ns")),  # as no Python object holds it
            "kind": pyarrow.array(["a", None] * (n // 2)).dictionary_encode(),
        }
    ).replace_schema_metadata({"huggingface": "{}"})
    parquet.write_table(table, folder / "metadata.parquet", row_group_size=4)
    return folder


def test_metadata_in_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, other columns, order and the table's own notes stay."""
    monkeypatch.setattr(tables, "_ROWS", 4)
    folder = parquet_imagefolder(tmp_path / "in")
    before, _, manifest = published(folder, tmp_path / "out")
    assert (before.format, manifest["metadata"]) == ("imagefolder", ["metadata.parquet"])
    assert before.image_of.tolist() == [0, 0, 1, 1, 2, 3, 4, 5]
    old, new = (parquet.read_table(path / "metadata.parquet") for path in (folder, tmp_path / "out"))
    assert new.schema.equals(old.schema, check_metadata=True)
    assert new.drop_columns(["caption"]).equals(old.drop_columns(["caption"]))
    for one, two in zip(old["caption"].to_pylist(), new["caption"].to_pylist(), strict=True):
        assert [is_protected(a, b) for a, b in zip(one, two, strict=True)] == [True] * len(one)


def test_a_parquet_table_by_its_name(tmp_path: Path) -> None:
    made.write_csv(tmp_path / "in")
    rows = {"images": [f"pictures/{i}.png" for i in range(6)], "caption": [made.caption(i) for i in range(5)] + [None]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "in" / "pairs.parquet")
    listing = list_pairs(tmp_path / "in" / "pairs.parquet")
    assert listing.format == "csv" and listing.captions == [made.caption(i) for i in range(5)]
    assert [str(bad) for bad in listing.bad] == [
        "pairs.parquet, record 6: expected the header's fields, with strings in images and caption"
    ]
    rows = {"file_name": ["in/pictures/0.png"], "text": ["a"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "plain.parquet")
    assert list_pairs(tmp_path / "plain.parquet").columns == ("file_name", "text")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"input: .*bad\.parquet: expected Parquet, got "):
        list_pairs(tmp_path / "bad.parquet")
    embedded = {"image": [{"bytes": b"x", "path": None}], "text": ["a"]}
    parquet.write_table(pyarrow.table(embedded), tmp_path / "hf.parquet")
    with pytest.raises(
        ValueError, match=r"expected .* images and text, got image, text \(.*; pictures inside a table are not read\)"
    ):
        list_pairs(tmp_path / "hf.parquet")


def test_a_parquet_table_is_published_and_read_by_its_folder(tmp_path: Path) -> None:
    made.write_csv(tmp_path / "in")
    (tmp_path / "in" / "train.csv").unlink()
    rows = {"images": [f"pictures/{i}.png" for i in range(6)], "caption": [made.caption(i) for i in range(6)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "in" / "pairs.PARQUET")
    published(tmp_path / "in" / "pairs.PARQUET", tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {*rows["images"], "pairs.PARQUET", "manifest.json", "README.md"}


BYTES = {
    "bytes": pyarrow.array([b"clean"] * 6),
    "struct": pyarrow.array([{"bytes": b"clean", "path": "0.png"}] * 6),
    "list": pyarrow.array([[b"clean"]] * 6),
    "large": pyarrow.array([b"clean"] * 6, pyarrow.large_binary()),
    "dictionary": pyarrow.array([b"clean"] * 6).dictionary_encode(),
    "fixed": pyarrow.array([b"c" * 65] * 6, pyarrow.binary(65)),
    "pixels": pyarrow.array([[1, 2]] * 6, pyarrow.list_(pyarrow.uint8())),
}


@pytest.mark.parametrize("column", BYTES)
def test_a_table_that_may_hold_clean_pictures_is_refused(tmp_path: Path, column: str) -> None:
    folder = parquet_imagefolder(tmp_path / "in")
    table = parquet.read_table(folder / "metadata.parquet").append_column("image", BYTES[column])
    parquet.write_table(table, folder / "metadata.parquet")
    with pytest.raises(ValueError, match=r"input: expected no columns of bytes, .*, got image in .*metadata\.parquet"):
        protect_dataset(job(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert list_pairs(folder).n_images == 6  # to train on, which gives nothing away


def test_hashes_are_no_pictures(tmp_path: Path) -> None:
    folder = parquet_imagefolder(tmp_path / "in")
    table = parquet.read_table(folder / "metadata.parquet")
    table = table.append_column("sha512", pyarrow.array([b"c" * 64] * 6, pyarrow.binary(64)))
    parquet.write_table(table, folder / "metadata.parquet")
    published(folder, tmp_path / "out")


def test_one_column_for_pictures_and_captions_is_refused(tmp_path: Path) -> None:
    table = made.write_csv(tmp_path / "in")
    with pytest.raises(ValueError, match=r"caption_column: expected another column than that of the images, got id"):
        list_pairs(table, Options(image_column="id", caption_column="id"))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet_imagefolder(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow"):
        list_pairs(folder)


# ---- the columns that were named


def test_what_was_published_is_read_by_the_columns_of_its_manifest(tmp_path: Path) -> None:
    table = made.write_csv(tmp_path / "in")
    table.write_bytes(table.read_bytes().replace(b"id,images,caption", b"caption,where,said"))
    before, _, manifest = published(table, tmp_path / "out", image_column="where", caption_column="said")
    assert manifest["columns"] == ["where", "said"]
    for path in (tmp_path / "out", tmp_path / "out" / "train.csv"):
        assert pairs_in(list_pairs(path)) == pairs_in(list_pairs(tmp_path / "out", Options(caption_column="said")))
        assert [is_protected(*two) for two in zip(before.captions, list_pairs(path).captions, strict=True)] == [
            True
        ] * 7
    ids = list_pairs(tmp_path / "out", Options(caption_column="caption"))
    assert ids.captions[0] == "id 0", "an option goes before the manifest"
    other = tmp_path / "out" / "mine.csv"
    other.write_text(f"images,caption\npictures/0.png,{made.caption(0)}\n")
    assert list_pairs(other).captions == [made.caption(0)], "not a file of the manifest"


def test_shards_that_were_published_are_read_by_the_field_of_their_manifest(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(4):
        members |= {f"{i}.png": made.encoded(i), f"{i}.json": about(i, title=made.caption(i))}
    source = shard(tmp_path / "in" / "s.tar", members)
    before, after, _ = published(source, tmp_path / "out", caption_column="title")
    for path in (tmp_path / "out", tmp_path / "out" / "s.tar"):
        assert list_pairs(path).captions == after.captions != before.captions


def test_a_part_of_what_was_published_is_read_by_the_same_columns(tmp_path: Path) -> None:
    for part, numbers in (("train", range(4)), ("test", range(4, 6))):
        split(tmp_path / "in" / part, numbers, "said", "jsonl")
        table = tmp_path / "in" / part / "metadata.jsonl"
        lines = [json.dumps({"caption": "id", **json.loads(line)}) for line in table.read_text().splitlines()]
        table.write_text("\n".join(lines))
    published(tmp_path / "in", tmp_path / "out", caption_column="said")
    whole = list_pairs(tmp_path / "out").captions
    for path in ("out/train", "out/train/metadata.jsonl"):
        options = Options(format="imagefolder") if path.endswith("jsonl") else None
        assert list_pairs(tmp_path / path, options).captions == whole[2:]


ANOTHERS = [
    "[]",
    "",
    '{"a": 1}\n{"a": 2}\n',
    '{"format": "csv", "columns": ["images", "id"]}',
    '{"format": "csv", "columns": ["images", "id"], "sha256": null, "run": "x"}',
    '{"format": "csv", "columns": [1], "sha256": {}, "run": "x"}',
    '{"format": "csv", "columns": [1, 2], "sha256": {}, "run": "x"}',
]


@pytest.mark.parametrize("text", ANOTHERS)
def test_another_program_s_manifest_is_not_looked_at(tmp_path: Path, text: str) -> None:
    made.write_csv(tmp_path / "in")
    (tmp_path / "in" / "manifest.json").write_text(text)
    for path in (tmp_path / "in", tmp_path / "in" / "train.csv"):
        assert list_pairs(path).captions[0] == made.caption(0)


# ---- shards


def test_shards_in_subfolders(tmp_path: Path) -> None:
    for part in ("a", "b/c"):
        made.write_shards(tmp_path / "in" / part, n=2, shard=2)
    before, _, _ = published(tmp_path / "in", tmp_path / "out")
    assert before.shard_names == ["a/00000.tar", "b/c/00000.tar"]
    assert set(tree(tmp_path / "out")) == {"a/00000.tar", "b/c/00000.tar", "manifest.json", "README.md"}


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz"])
def test_compressed_shards(tmp_path: Path, ending: str) -> None:
    """Published without the compression, of which PNGs would gain nothing."""
    folder = made.write_shards(tmp_path / "in")
    plain = folder / "00001.tar"
    (folder / f"00001{ending}").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    before, _, _ = published(tmp_path / "in", tmp_path / "out")
    assert before.captions == [made.caption(i) for i in range(6)]
    assert set(tree(tmp_path / "out")) == {"00000.tar", "00001.tar", "manifest.json", "README.md"}
    assert list_pairs(folder / f"00001{ending}").n_images == 3
    plain.write_bytes((folder / "00000.tar").read_bytes())
    (bad,) = list_pairs(folder).bad
    assert str(bad) == f"00001{ending}: unreadable shard: the name of an earlier one without its ending, 00001.tar"


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no gzip", lambda data: b""])
def test_damaged_compression(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = made.write_shards(tmp_path / "in")
    data = gzip.compress((folder / "00001.tar").read_bytes())
    (folder / "00001.tar").unlink()
    (folder / "00001.tar.gz").write_bytes(damage(data))
    listing = list_pairs(folder)
    (bad,) = listing.bad
    assert bad.where == "00001.tar.gz" and bad.why.startswith("unreadable shard: not a whole")
    assert listing.n_images == 3


def test_a_full_disk_is_not_a_bad_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in sorted(made.write_shards(tmp_path / "in").glob("*.tar")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    folder = Path(copies._folder())
    before = set(folder.iterdir())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said = r"room for an uncompressed copy of .*00000\.tar\.gz in .*, got No space left on device"
    with monkeypatch.context() as disk, pytest.raises(OSError, match=said) as caught:
        disk.setattr(tempfile._TemporaryFileWrapper, "flush", full, raising=False)
        list_pairs(tmp_path / "in")
    assert caught.value.errno == errno.ENOSPC and set(folder.iterdir()) == before, "half a copy stayed"
    assert list_pairs(tmp_path / "in").n_images == 6


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No usable temporary directory"), OSError(errno.EROFS, "Read-only")]
)
def test_no_folder_for_copies_is_not_a_bad_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """With ``--skip-bad`` every compressed shard would be left out."""
    plain = made.write_shards(tmp_path / "in") / "00000.tar"
    plain.with_name("00000.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()

    def none() -> str:
        raise error

    monkeypatch.setattr(copies, "_folder", none)
    with pytest.raises(OSError, match=r"expected room for an uncompressed copy of .*00000\.tar\.gz"):
        protect_dataset(job(tmp_path / "in", tmp_path / "out", skip_bad=True))


def test_copies_of_a_killed_process_are_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither those of one at work nor what is not a process's own."""
    for path in sorted(made.write_shards(tmp_path / "in").glob("*.tar")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(copies, "_folder", cache(copies._folder.__wrapped__))
    monkeypatch.setattr(copies, "_copied", cache(copies._copied.__wrapped__))
    theirs = {  # of users, whatever they are called
        tmp_path / "ccu-fast-shards-train" / "lock",
        tmp_path / "ccu-fast-shards-abcdefgh" / "notes.txt",
        tmp_path / "ccu-fast-shards-abcdefgi" / "00000.tar",
        tmp_path / "ccu-fast-shards-abcdefgi" / "lock",
    }
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def folders() -> set[Path]:
        return {path for path in tmp_path.glob("ccu-fast-shards-*") if list(path.glob("copy-*.tar"))}

    def killed() -> None:
        assert list_pairs(tmp_path / "in").n_images == 6
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(killed)) == signal.SIGKILL
    assert len(folders()) == 1, "what a killed process leaves"
    assert list_pairs(tmp_path / "in").n_images == 6
    (own,) = folders()
    assert len(list(own.glob("*.tar"))) == 2 and all(path.exists() for path in theirs)

    def another() -> None:
        copies._folder.cache_clear()
        copies._copied.cache_clear()
        assert list_pairs(tmp_path / "in").n_images == 6
        assert own in folders() and len(folders()) == 2
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(another)) == signal.SIGKILL
    assert own in folders()


def test_dots_in_keys(tmp_path: Path) -> None:
    """webdataset cuts at the first dot; pictures with captions of their own behind it are pairs of their own."""
    members: dict[str, bytes | str] = {"photo.png": made.encoded(0), "photo.txt": made.caption(0)}
    for i in (1, 2):
        members |= {f"photo.{i}.png": made.encoded(i), f"photo.{i}.txt": made.caption(i), f"photo.{i}.json": about(i)}
    members |= {"v1.2/other.png": made.encoded(3), "v1.2/other.seg.png": made.encoded(9)}
    members |= {"v1.2/other.txt": made.caption(3)}
    before, _, manifest = published(shard(tmp_path / "s.tar", members), tmp_path / "out")
    assert set(before.captions) == {made.caption(i) for i in range(4)}
    assert set(before.names) == {f"s.tar/{key}.png" for key in ("photo", "photo.1", "photo.2", "v1.2/other")}
    assert manifest["members_left_out"] == {"seg.png": 1}
    assert set(members_of(tmp_path / "out" / "s.tar")) == set(members) - {"v1.2/other.seg.png"}


def test_capitals_in_keys(tmp_path: Path) -> None:
    """What stands between dots is a part of the key; only the ending is the same in capitals."""
    members: dict[str, bytes | str] = {}
    for i, name in enumerate(("img.V0", "img.v0", "img.a0", "Img.a0")):
        members |= {f"{name}.PNG": made.encoded(i), f"{name}.Txt": made.caption(i)}
    before, _, _ = published(shard(tmp_path / "s.tar", members), tmp_path / "out")
    assert before.names == [f"s.tar/{key}.png" for key in ("img.V0", "img.v0", "img.a0", "Img.a0")]
    written = members_of(tmp_path / "out" / "s.tar")
    assert set(written) == {name[:-3] + name[-3:].lower() for name in members}


def test_dots_in_keys_whose_captions_are_in_json(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(4):
        members |= {f"photo.{i}.jpg": made.encoded(i, "jpeg"), f"photo.{i}.json": about(i, caption=made.caption(i))}
    before, _, _ = published(shard(tmp_path / "s.tar", members), tmp_path / "out")
    assert before.names == [f"s.tar/photo.{i}.png" for i in range(4)]
    # Beside a picture without a dot it is no pair, but something about that picture.
    masks: dict[str, bytes | str] = {"photo.jpg": made.encoded(0, "jpeg"), "photo.txt": made.caption(0)}
    masks |= {"photo.seg.png": made.encoded(1), "photo.seg.json": about(1, caption="no caption of a photo")}
    listing = list_pairs(shard(tmp_path / "t.tar", masks))
    assert (listing.bad, listing.captions) == ([], [made.caption(0)])
    # Nor where the caption has no dot.
    for ending, text in (("txt", made.caption(1)), ("json", about(1, caption=made.caption(1)))):
        one: dict[str, bytes | str] = {"0.img.jpg": made.encoded(0, "jpeg"), "0.img.json": "{}", f"0.{ending}": text}
        listing = list_pairs(shard(tmp_path / "u.tar", one))
        assert (listing.bad, listing.captions) == ([], [made.caption(1)])


def test_dots_in_the_names_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"x.v{i}.png").write_bytes(made.encoded(i))
        (tmp_path / "in" / f"x.v{i}.txt").write_text(made.caption(i))
    before, _, _ = published(tmp_path / "in", tmp_path / "out")
    assert before.names == [f"x.v{i}.png" for i in range(4)]


def test_only_line_ends_end_a_caption(tmp_path: Path) -> None:
    folder = made.write_folder(tmp_path / "in")
    odd = "one\u2028line \x0c or \x85 more"
    (folder / "0.txt").write_bytes(f"{odd}\r\n\nsecond\n".encode())
    before, after, _ = published(folder, tmp_path / "out")
    assert before.captions[:2] == [odd, "second"] and after.captions[0].endswith(odd)


# ---- pictures


def test_endings_in_capitals_are_pairs(tmp_path: Path) -> None:
    folder = made.write_folder(tmp_path / "in")
    (folder / "0.txt").rename(folder / "0.TXT")
    (folder / "0.png").rename(folder / "0.PNG")
    published(folder, tmp_path / "out")
    assert (tmp_path / "out" / "0.txt").exists()


def test_the_manifest_counts_what_pictures_had(tmp_path: Path) -> None:
    table = made.write_csv(tmp_path / "in")
    folder = tmp_path / "in" / "pictures"
    for i in (0, 3):
        made.picture(i).convert("RGBA").save(folder / f"{i}.png")
    made.picture(1).save(folder / "1.png", icc_profile=b"profile")
    Image.new("I;16", (16, 16), 30_000).save(folder / "2.png")
    _, _, manifest = published(table, tmp_path / "out")
    assert manifest["pictures"] == {
        "16 bits a channel made 8": 1,
        "colour profile not applied": 1,
        "transparency dropped": 2,
    }


# ---- names that lead out


def test_nothing_is_written_outside_the_output(tmp_path: Path) -> None:
    """Paths with ``..`` are read where they lead, and published below the output."""
    made.write_csv(tmp_path / "elsewhere" / "deep")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    rows = [f"../elsewhere/deep/pictures/{i}.png,{made.caption(i)}" for i in range(3)]
    rows += [f"sub/../../elsewhere/deep/pictures/{i}.png,{made.caption(i)}" for i in range(3, 6)]
    (tmp_path / "in" / "t.csv").write_text("images,caption\n" + "\n".join(rows) + "\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    published(tmp_path / "in" / "t.csv", tmp_path / "out")
    outside = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.is_file() and not path.is_relative_to(tmp_path / "out")
    }
    assert outside == before
    assert set(tree(tmp_path / "out")) == {
        *(f"images/{i}.png" for i in range(6)),
        "t.csv",
        "manifest.json",
        "README.md",
    }
