"""Readers of image-caption datasets: what they list, what they refuse, what is alive while they read."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import tarfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ccu_fast.data.captions import DiskSource, Options, Scan, list_pairs, scan
from ccu_fast.data.captions import dataset as dataset_module
from ccu_fast.data.captions.dataset import bad_pictures
from ccu_fast.data.captions.listing import published_names
from ccu_fast.data.captions.tables import read_records, rewrite
from ccu_fast.data.load import load_captions
from ccu_fast.data.pictures import BadPicture, decode
from tests.support import mem_datasets as made
from tests.support.mem_datasets import WRITERS

SHAPE = (3, 16, 16)


def why(path: Path, **options: Any) -> list[str]:
    return [str(bad) for bad in list_pairs(path, Options(**options)).bad]


@pytest.mark.parametrize("format", WRITERS)
def test_a_path_from_where_one_stands_gives_the_same_names(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[format](tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    here = list_pairs(path.relative_to(tmp_path))
    assert here.names == list_pairs(path).names
    assert not any(name.startswith("in/") for name in here.names)


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_is_recognised_and_read(tmp_path: Path, format: str) -> None:
    listing = list_pairs(WRITERS[format](tmp_path / "in"))
    assert (listing.format, listing.bad, listing.n_images) == (format, [], 6)
    source = DiskSource(listing, SHAPE, threads=2)
    rows = {(int(listing.image_of[row]), text) for row, text in enumerate(listing.captions)}
    assert len(rows) == 7 if format in ("csv", "folder") else 6
    for number in range(6):
        name = Path(listing.names[number]).stem
        assert (number, made.caption(int(name))) in rows
        pixels = source.images(torch.tensor([number]))[0]
        assert torch.equal(pixels, decode(made.encoded(int(name)), SHAPE))


def test_csv_dialects(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(made.encoded(i))
    text = f'caption,images,x\r\n"two\nlines, ""quoted""",0.png,\r\nb,{tmp_path}/1.png,\r\nc,./0.png,\r\n'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    listing = list_pairs(tmp_path / "a.csv")
    assert listing.captions == ['two\nlines, "quoted"', "b", "c"]
    assert listing.image_of.tolist() == [0, 1, 0]
    assert listing.names == ["0.png", "1.png"]
    (tmp_path / "b.tsv").write_text("path\ttitle\n2.png\td\n")
    listing = list_pairs(tmp_path / "b.tsv", Options(image_column="path", caption_column="title"))
    assert (listing.captions, listing.columns) == (["d"], ("path", "title"))


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ("image,caption", ("image", "caption")),
        ("title,filepath", ("filepath", "title")),
        ("image_path,title,text", ("image_path", "text")),
        ("image,filename,text,caption", ("filename", "caption")),
        ("image,file_name,images,text", ("images", "text")),
    ],
)
def test_usual_columns_are_known(tmp_path: Path, columns: str, taken: tuple[str, str]) -> None:
    (tmp_path / "0.png").write_bytes(made.encoded(0))
    names = columns.split(",")
    row = ["0.png" if name == taken[0] else "a fox" if name == taken[1] else "else" for name in names]
    (tmp_path / "a.csv").write_text(f"{columns}\n{','.join(row)}\n")
    listing = list_pairs(tmp_path / "a.csv")
    assert (listing.columns, listing.captions, listing.names) == (taken, ["a fox"], ["0.png"])


def test_rewriting_a_table_keeps_everything_else(tmp_path: Path) -> None:
    text = 'images,caption,x\r\na.jpg,"q ""r"", s\nt",1\r\nb.jpg,u,\r\nc.jpg,v,2\r\n'
    (tmp_path / "in.csv").write_bytes(text.encode())
    rewrite(tmp_path / "in.csv", tmp_path / "same.csv", lambda _, record: record)
    assert (tmp_path / "same.csv").read_bytes() == text.encode()
    rewrite(tmp_path / "in.csv", tmp_path / "out.csv", lambda i, r: None if i == 1 else {**r, "caption": "\r alone"})
    assert [r["caption"] for r in read_records(tmp_path / "out.csv")] == ["\r alone"] * 2
    (tmp_path / "lf.csv").write_text("images,caption\na,b\n")
    rewrite(tmp_path / "lf.csv", tmp_path / "lf2.csv", lambda _, r: {**r, "caption": "x\ry"})
    assert [r["caption"] for r in read_records(tmp_path / "lf2.csv")] == ["x\ry"]
    assert b"\r\n" not in (tmp_path / "lf2.csv").read_bytes()


def test_published_names(tmp_path: Path) -> None:
    inside = [str(tmp_path / "a.jpg"), str(tmp_path / "d" / "a.jpg"), str(tmp_path / "b.jpg"), str(tmp_path / "b.gif")]
    assert published_names(inside, tmp_path) == ["a.png", "d/a.png", "b.jpg.png", "b.gif.png"]
    outside = ["/data/coco/train/1.jpg", "/data/coco/val/1.jpg"]
    assert published_names(outside, tmp_path) == ["images/train/1.png", "images/val/1.png"]


def test_bad_pictures_are_found_and_named(tmp_path: Path) -> None:
    table = made.write_csv(tmp_path / "in", n=6)
    folder = tmp_path / "in" / "pictures"
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-300])
    (folder / "3.png").write_text("no picture")
    (folder / "4.png").write_bytes(made.encoded(4, size=(300, 200)))
    listing = list_pairs(table)
    source = DiskSource(listing, SHAPE, threads=2, max_pixels=59_999)
    found = scan(source, range(6))
    assert list(found.bad) == [1, 2, 3, 4]
    told = [str(bad) for bad in bad_pictures(listing, found.bad)]
    assert told[0] == f"{folder}/1.png: no such file"
    assert "truncated" in told[1] or "broken" in told[1]
    assert told[2].endswith("3.png: not a picture")
    assert told[3].endswith("4.png: expected at most 59999 pixels, got 300 x 200")
    rest = listing.without(list(found.bad), bad_pictures(listing, found.bad))
    assert [Path(name).stem for name in rest.names] == ["0", "5"]
    assert rest.captions == [made.caption(0), made.caption(5), made.caption(99)]
    assert (rest.image_of.tolist(), rest.records, len(rest.bad)) == ([0, 1, 0], [0, 5, 6], 4)
    with pytest.raises(BadPicture, match=r"3\.png: not a picture"):
        source.images(torch.tensor([0, 3]))


def test_a_scan_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found good is not read again; what was bad, and may have been mended, is."""
    monkeypatch.setattr(dataset_module, "KEPT", 0.0)
    monkeypatch.setattr(dataset_module, "_CHUNK", 4)
    folder = tmp_path / "in" / "pictures"
    listing = list_pairs(made.write_csv(tmp_path / "in", n=10))
    source = DiskSource(listing, SHAPE, threads=2)
    whole = scan(source, range(10), whole=True)
    mended = (folder / "1.png").read_bytes()
    (folder / "1.png").write_text("no picture")
    kept: list[Scan] = []
    scan(source, range(10), whole=True, keep=lambda found: kept.append(copy.deepcopy(found)))
    assert [int(found.digests.any(1).sum()) for found in kept] == [3, 7] and list(kept[0].bad) == [1]
    (folder / "1.png").write_bytes(mended)
    read: list[int] = []
    inner = DiskSource.read
    monkeypatch.setattr(DiskSource, "read", lambda self, number: (read.append(number), inner(self, number))[1])
    again = scan(source, range(10), whole=True, seen=kept[0])
    assert sorted(read) == [1, 4, 5, 6, 7, 8, 9]
    assert again.sizes is not None and whole.sizes is not None
    assert torch.equal(again.digests, whole.digests) and torch.equal(again.sizes, whole.sizes)
    assert (again.bad, again.notes) == (whole.bad, whole.notes)


def test_a_picture_that_changes_later_is_refused(tmp_path: Path) -> None:
    listing = list_pairs(made.write_csv(tmp_path / "in"))
    digests = scan(DiskSource(listing, SHAPE, threads=1), range(6)).digests
    source = DiskSource(listing, SHAPE, threads=1, digests=digests)
    source.images(torch.arange(6))
    Path(listing.files[2]).write_bytes(made.encoded(77))
    with pytest.raises(BadPicture, match=r"2\.png: changed since it was checked"):
        source.images(torch.arange(6))


def test_bad_rows(tmp_path: Path) -> None:
    lines = ["images,caption", "a.png,one", "a.png,", "a.png,one", "a.png,two", "b.png", "c.png,x,y", ",x", "a.png,  "]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    assert why(tmp_path / "t.csv") == [
        "t.csv, record 2: empty caption",
        "t.csv, record 3: the same image and caption as an earlier row",
        "t.csv, record 5: expected the header's fields, with strings in images and caption",
        "t.csv, record 6: expected the header's fields, with strings in images and caption",
        "t.csv, record 7: no path in images",
        "t.csv, record 8: empty caption",
    ]
    folder = made.write_folder(tmp_path / "folder")
    (folder / "2.txt").unlink()
    (folder / "4.txt").write_text("\n")
    (folder / "deep" / "9.txt").write_text("lonely")
    assert why(folder) == [
        "2.png: no caption file 2.txt",
        "4.txt: empty caption",
        "deep/9.txt: no picture beside this caption file",
    ]


def _cut_in_data(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:1000])


def _cut_between(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        second = archive.getmembers()[1]
    data[second.offset : second.offset + 512] = bytes(range(256)) * 2
    shard.write_bytes(data)


def _compress(shard: Path) -> None:
    import gzip

    shard.write_bytes(gzip.compress(shard.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_cut_in_data, "truncated"), (_cut_between, "damaged"), (_compress, "not a whole, uncompressed")],
)
def test_a_damaged_shard_is_left_out_as_a_whole(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = made.write_shards(tmp_path / "in")
    damage(folder / "00000.tar")
    listing = list_pairs(folder)
    assert len(listing.bad) == 1 and f"00000.tar: unreadable shard: {message}" in str(listing.bad[0])
    assert listing.captions == [made.caption(i) for i in (3, 4, 5)]
    pixels = DiskSource(listing, SHAPE, threads=1).images(torch.arange(3))
    assert torch.equal(pixels[2], decode(made.encoded(5), SHAPE))


def test_bad_samples_of_a_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, data in {
            "two.png": made.encoded(0),
            "two.jpg": made.encoded(0, "jpeg"),
            "two.txt": b"x",
            "none.txt": b"x",
            "mute.png": made.encoded(1),
            "empty.png": made.encoded(1),
            "empty.txt": b" ",
            "good.png": made.encoded(2),
            "good.txt": b"fine",
        }.items():
            made.add_member(archive, name, data)
    listing = list_pairs(tmp_path / "s.tar")
    assert [str(bad) for bad in listing.bad] == [
        "s.tar/two: expected one picture, got ['png', 'jpg']",
        "s.tar/none: expected one picture, got none",
        "s.tar/mute: no caption mute.txt or mute.json",
        "s.tar/empty: empty caption",
    ]
    assert (listing.captions, listing.records, listing.names) == (["fine"], [4], ["s.tar/good.png"])


def test_wrong_inputs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list_pairs(tmp_path / "nowhere")
    (tmp_path / "t.csv").write_text("file,text\na,b\n")
    with pytest.raises(ValueError, match="expected the columns images and text, got file, text"):
        list_pairs(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("images,images\na,b\n")
    with pytest.raises(ValueError, match="distinct columns"):
        list_pairs(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"images,caption\na,\xff\n")
    with pytest.raises(ValueError, match="expected UTF-8"):
        list_pairs(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text('images,caption\na,"b\n')
    with pytest.raises(ValueError, match="expected CSV"):
        list_pairs(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("images,caption\n")
    with pytest.raises(ValueError, match="expected image-caption pairs, got none"):
        list_pairs(tmp_path / "t.csv")
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match=r"expected \.csv, \.tsv, \.parquet, \.tar, \.tar\.gz, \.tgz or a folder"):
        list_pairs(tmp_path / "notes.md")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n[1]\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        list_pairs(tmp_path / "hf")
    with pytest.raises(ValueError, match="format: expected one of"):
        Options(format="parquet")
    with pytest.raises(ValueError, match="image_column: expected with csv or imagefolder only, got format webdataset"):
        list_pairs(made.write_shards(tmp_path / "shards"), Options(image_column="x"))
    with pytest.raises(ValueError, match="caption_column: expected with csv or imagefolder or webdataset only"):
        list_pairs(made.write_folder(tmp_path / "folder"), Options(caption_column="x"))


def test_errors_name_the_argument_that_the_dataset_came_as(tmp_path: Path) -> None:
    def said(path: Path, **options: Any) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_captions(path, SHAPE, lambda captions: torch.zeros(len(captions), 2), Options(**options))
        return str(caught.value)

    table = made.write_csv(tmp_path / "in")
    (tmp_path / "notes.md").touch()
    (tmp_path / "empty").mkdir()
    assert said(tmp_path / "nowhere").startswith("path: expected a file or folder")
    assert said(tmp_path / "notes.md").startswith("path: expected .csv")
    assert said(tmp_path / "empty").startswith("path: expected image-caption pairs")
    assert said(tmp_path / "empty", format="csv").startswith("path: expected one .csv, .tsv or .parquet file")
    assert said(table, caption_column="words").startswith(f"path: {table}: expected the columns images and words")
    (tmp_path / "in" / "pictures" / "3.png").write_text("no picture")
    told = said(table)
    assert told.startswith("path: expected usable pictures, got ") and told.endswith("3.png: not a picture")
    table.write_text("images,caption\npictures/0.png,\n")
    assert said(table).startswith("path: expected usable pairs, got 1 bad item")


def test_pictures_alive_do_not_grow_with_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of decoded pictures during a pass is one for each thread, whatever the number of pictures."""
    folder = made.write_shards(tmp_path / "in", n=40, shard=20)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    peak = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        pixels = decode(*arguments, **options)
        alive.add(pixels)
        peak.append(len(alive))
        return pixels

    monkeypatch.setattr(dataset_module, "decode", counted)
    source = DiskSource(list_pairs(folder), SHAPE, threads=3)
    scan(source, range(40))
    for part in torch.arange(40).split(8):
        source.images(part)
    gc.collect()
    assert len(peak) == 80
    assert max(peak) <= 2 * 3, "each thread has one picture, and one it is letting go"
    assert not alive


def test_threads_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding threads are made once, not for each pass; a closed source has none."""
    import threading

    source = DiskSource(list_pairs(made.write_folder(tmp_path / "in")), SHAPE, threads=2)
    seen = set()
    monkeypatch.setattr(dataset_module, "decode", lambda *a, **k: (seen.add(threading.get_ident()), decode(*a, **k))[1])
    for _ in range(20):
        source.images(torch.arange(6))
    assert 1 <= len(seen) <= 2
    source.close()
    with pytest.raises(RuntimeError):
        source.images(torch.arange(2))


def test_a_listing_moves_with_its_folder_and_not_with_the_rest(tmp_path: Path) -> None:
    one = made.write_csv(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, second = list_pairs(one), list_pairs(tmp_path / "two")
    assert first.fingerprint() == second.fingerprint()
    os.rename(tmp_path / "two" / "train.csv", tmp_path / "two" / "other.csv")
    with (tmp_path / "two" / "other.csv").open("a") as file:
        file.write("id,pictures/1.png,new\r\n")
    assert list_pairs(tmp_path / "two", Options(format="csv")).fingerprint() != first.fingerprint()
