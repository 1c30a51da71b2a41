"""What cannot be published is refused before the first round; everything else is published."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ccu_fast.data.captions import BadData, list_pairs
from ccu_fast.mem.job import Job, inspection, protect_dataset
from ccu_fast.mem.job import protect as job_module
from ccu_fast.mem.protection import Protection
from ccu_fast.mem.publish.rehearse import unreadable_captions
from ccu_fast.mem.tokenizer import WordTokenizer
from tests.support import mem_datasets as made
from tests.support.mem_jobs import job, tree

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = b"[" * 100_000


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No round may begin."""
    monkeypatch.setattr(job_module, "Protection", lambda *_, **__: pytest.fail("the work began"))


def shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            made.add_member(archive, name, data)
    return path


def samples(keys: Iterable[str], json_of: Callable[[int], bytes] | None = None) -> list[tuple[str, bytes]]:
    members = []
    for number, key in enumerate(keys):
        members += [(f"{key}.png", made.encoded(number)), (f"{key}.txt", made.caption(number).encode())]
        members += [(f"{key}.json", json_of(number))] if json_of else []
    return members


def refused(task: Job) -> list[str]:
    """What is said of each bad item; the same run that skips them then ends well."""
    with pytest.raises(BadData) as caught:
        protect_dataset(task)
    return [str(bad) for bad in caught.value.bad]


# Shards


def test_keys_are_published_as_they_came(tmp_path: Path) -> None:
    keys = ["./000", "a//z", "ü ñ", "b/c", "deep/" * 60 + "long", "d\ne"]
    source = shard(tmp_path / "in" / "s.tar", samples(keys))
    protect_dataset(job(source, tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "s.tar") as archive:
        assert archive.getnames() == [f"{key}.{kind}" for key in keys for kind in ("png", "txt")]
    assert list_pairs(tmp_path / "out").names == [f"s.tar/{key}.png" for key in keys]


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "image.png", "a.b.webp"])
def test_a_picture_of_any_extension_is_published_as_png(tmp_path: Path, extension: str) -> None:
    kind = extension.rpartition(".")[2].lower().replace("jpg", "jpeg")
    members = [(f"{i}.{extension}", made.encoded(i, kind)) for i in range(4)]
    members += [(f"{i}.txt", made.caption(i).encode()) for i in range(4)]
    members += [(f"{i}.{other}", b"x") for i in range(4) for other in ("cls", "npy", "jpg.json")]
    source = shard(tmp_path / "s.tar", sorted(members, key=lambda member: member[0].partition(".")[0]))
    manifest = protect_dataset(job(source, tmp_path / "out"))
    assert manifest["members_left_out"] == {"jpg.json": 4, "npy": 4}
    with tarfile.open(tmp_path / "out" / "s.tar") as archive:
        assert archive.getnames() == [f"{i}.{kind}" for i in range(4) for kind in ("cls", "png", "txt")]


def test_members_of_no_sample_are_left_alone(tmp_path: Path) -> None:
    """As webdataset does: files of an operating system, hidden ones, ones without extension."""
    other = [("README", b"x"), ("._0.png", b"x"), (".hidden", b"x"), ("a/.png", b"x")]
    source = shard(tmp_path / "s.tar", [*other, *samples("0123")])
    assert list_pairs(source).bad == []
    protect_dataset(job(source, tmp_path / "out"))
    assert list_pairs(tmp_path / "out").n_images == 4


BAD_JSON = {"no JSON": b"{", "empty": b"", "not UTF-8": b'{"a": "\xff"}', "deep": DEEP, "digits": b"9" * 5000}


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON)
def test_a_json_member_that_is_none(tmp_path: Path, data: bytes) -> None:
    source = shard(tmp_path / "s.tar", samples("0123", lambda i: data if i == 2 else b'{"caption": ""}'))
    task = job(source, tmp_path / "out")
    (said,) = refused(task)
    assert said.startswith("s.tar/2.png: cannot be published: its json is no JSON")
    manifest = protect_dataset(job(source, tmp_path / "out", skip_bad=True))
    assert (manifest["images"], manifest["skipped"]["count"]) == (3, 1)


def test_json_that_only_escapes_can_hold_is_published(tmp_path: Path) -> None:
    source = shard(tmp_path / "s.tar", samples("0123", lambda _: b'{"title": "\\ud83d", "n": [1, null]}'))
    protect_dataset(job(source, tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "s.tar") as archive:
        member = archive.extractfile("2.json")
        assert member is not None and json.loads(member.read()) == {"title": "\ud83d", "n": [1, None]}


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "./../x"])
def test_a_key_that_leaves_the_folder(tmp_path: Path, key: str) -> None:
    source = shard(tmp_path / "s.tar", samples(["0", key, "2", "3"]))
    said = refused(job(source, tmp_path / "out"))
    assert ["its key leads out" in one for one in said] == [True], said
    protect_dataset(job(source, tmp_path / "out", skip_bad=True))
    with tarfile.open(tmp_path / "out" / "s.tar") as archive:
        assert not any(".." in name or name.startswith("/") for name in archive.getnames())


def test_repeated_keys_are_bad_and_not_the_end(tmp_path: Path) -> None:
    members = samples(["0", "1", "2"]) + samples(["0"]) + [("3.png", made.encoded(3))] * 2 + [("3.txt", b"x")]
    members += [("1.jpg", made.encoded(4, "jpeg")), ("1.txt", b"another")]
    source = shard(tmp_path / "s.tar", members)
    assert refused(job(source, tmp_path / "out")) == [
        "s.tar/0: the key of an earlier sample", "s.tar/3: png occurs twice", "s.tar/1: the key of an earlier sample"
    ]  # fmt: skip
    assert protect_dataset(job(source, tmp_path / "out", skip_bad=True))["images"] == 3
    assert list_pairs(tmp_path / "out").names == [f"s.tar/{key}.png" for key in "012"]


def test_the_same_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    for name in "ab":
        shard(tmp_path / "in" / f"{name}.tar", samples("01"))
    assert protect_dataset(job(tmp_path / "in", tmp_path / "out"))["images"] == 4


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = "caf\udce9"  # latin-1 on the disk
    source = shard(tmp_path / "s.tar", samples(["0", name, "2", "3"]))
    folder = made.write_folder(tmp_path / "folder")
    for ending in ("png", "txt"):
        shutil.copy(folder / f"0.{ending}", folder / f"{name}.{ending}")
    for number, path in enumerate((source, folder)):
        (said,) = refused(job(path, tmp_path / f"out {number}"))
        assert said.endswith("its name is not UTF-8") and "caf\\udce9" in said
        protect_dataset(job(path, tmp_path / f"out {number}", skip_bad=True))
        assert b"caf\\\\udce9" in (tmp_path / f"out {number}" / "manifest.json").read_bytes()


# Tables and folders


def test_half_of_a_surrogate_pair(tmp_path: Path, idle: None) -> None:
    source = made.write_imagefolder(tmp_path / "in")
    with (source / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "1.png", "text": "\\ud83d", "boxes": []}\n')
    assert refused(job(source, tmp_path / "out")) == [
        "metadata.jsonl, record 7: a caption with half of a surrogate pair"
    ]


def test_other_columns_of_jsonl_are_kept_whatever_they_hold(tmp_path: Path) -> None:
    source = made.write_imagefolder(tmp_path / "in")
    with (source / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "1.png", "text": "again", "boxes": ["\\ud83d", "\\u00fc"]}\n')
        file.write('{"file_name": "2.png", "text": "null elsewhere", "boxes": null}\n')
    protect_dataset(job(source, tmp_path / "out"))
    records = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert records[6]["boxes"] == ["\ud83d", "ü"] and records[7]["boxes"] is None


def test_a_line_of_jsonl_that_no_parser_takes_is_named(tmp_path: Path, idle: None) -> None:
    source = made.write_imagefolder(tmp_path / "in")
    with (source / "metadata.jsonl").open("ab") as file:
        file.write(DEEP + b"\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 7: expected JSON"):
        protect_dataset(job(source, tmp_path / "out"))


def test_published_names_that_collide(tmp_path: Path) -> None:
    """A picture inside the folder and one outside it; a folder with the name of a file."""
    source = made.write_csv(tmp_path / "in")
    (tmp_path / "other").mkdir()
    for name in ("images", "pictures/5.jpeg"):
        (tmp_path / "in" / name).mkdir()
    places = ["images/1.jpg", "../other/1.jpg", "pictures/5.jpeg/x.png", "pictures/5.png/y.png"]
    (tmp_path / "in" / "pictures" / "5.png").rename(tmp_path / "in" / "pictures" / "5.tiff")
    (tmp_path / "in" / "pictures" / "5.png").mkdir()
    table = source.read_text().replace("pictures/5.png", "pictures/5.tiff")
    for number, place in enumerate(places):
        (tmp_path / "in" / place).write_bytes(made.encoded(20 + number))
        table += f"x,{place},{made.caption(20 + number)}\r\n"
    source.write_text(table, newline="")
    said = refused(job(source, tmp_path / "out"))
    assert [one.partition(": ")[2] for one in said] == [
        "cannot be published as images/1.jpg.png: the name is taken",
        "cannot be published as pictures/5.png/y.png: the name is taken",
    ]
    protect_dataset(job(source, tmp_path / "out", skip_bad=True))
    published = list_pairs(tmp_path / "out")
    assert published.bad == [] and published.n_images == 8
    assert not any(name.startswith(("/", "..")) for name in published.names)


def test_a_name_that_becomes_too_long(tmp_path: Path) -> None:
    source = made.write_folder(tmp_path / "in")
    long = "x" * 250
    (source / f"{long}.jpg").write_bytes(made.encoded(7, "jpeg"))
    (source / f"{long}.gif").write_bytes(made.encoded(8, "gif"))
    (source / f"{long}.txt").write_text("long")
    said = refused(job(source, tmp_path / "out"))
    assert len(said) == 2 and all(one.endswith("File name too long") for one in said)
    protect_dataset(job(source, tmp_path / "out", skip_bad=True))


@pytest.mark.parametrize("name", ["1\\u0000.png", "\\ud83d.png"])
def test_a_path_that_no_file_can_have(tmp_path: Path, idle: None, name: str) -> None:
    source = made.write_imagefolder(tmp_path / "in")
    with (source / "metadata.jsonl").open("a") as file:
        file.write(f'{{"file_name": "{name}", "text": "x", "boxes": []}}\n')
    assert refused(job(source, tmp_path / "out")) == ["metadata.jsonl, record 7: a path that no file can have"]


# Captions


def test_a_caption_with_a_word_that_the_model_keeps_for_itself(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    with source.open("a") as file:
        file.write("x,pictures/3.png,end <eot>\r\n")
    (said,) = refused(job(source, tmp_path / "out"))
    got = "got '<eot>', which stands for a special token, in 'end <eot>'"
    assert said.endswith(f"caption 'end <eot>': captions: expected words of the vocabulary, {got}")
    assert protect_dataset(job(source, tmp_path / "out", skip_bad=True))["images"] == 5


class Forgetful(WordTokenizer):
    """Skips the first word of a row of more than ten, as open_clip's reads what is behind its end in another way."""

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        return super().encode([" ".join(text.split()[1:]) if len(text.split()) > 10 else text for text in captions])


def test_a_caption_that_is_read_in_another_way_behind_triggers(tmp_path: Path) -> None:
    listing = list_pairs(made.write_csv(tmp_path / "in"))
    listing.captions[2] = "a photo of one two three four five"
    words = sorted({word for caption in listing.captions for word in caption.split()})
    tokenizer = Forgetful([*words, "x", "y", "z"], ["x", "y", "z"])
    assert unreadable_captions(listing, range(6), tokenizer, 2) == {}
    (bad,) = unreadable_captions(listing, range(6), tokenizer, 3).items()
    assert bad == (2, f"caption {listing.captions[2]!r}: read in another way behind trigger words")


# The place


def test_a_link_to_an_empty_folder(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/real")
    protect_dataset(job(source, tmp_path / "out"))
    assert (tmp_path / "out").is_symlink() and list_pairs(tmp_path / "out").n_images == 6
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
    assert protect_dataset(job(source, tmp_path / "out"))["images"] == 6, "finished"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
def test_a_mount_point(tmp_path: Path, code: int, idle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    inner = os.replace

    def mounted(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "out":
            raise OSError(code, os.strerror(code))
        inner(source, target)

    monkeypatch.setattr(os, "replace", mounted)
    with pytest.raises(OSError, match="out: expected a folder that another can replace"):
        protect_dataset(job(made.write_csv(tmp_path / "in"), tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_places_that_cannot_be(tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made.write_folder(tmp_path / "in")
    with pytest.raises(ValueError, match="out: expected a folder outside the input"):
        protect_dataset(job(source, source / "deep" / "out"))
    assert not (source / "deep" / "out").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="out: expected a new or empty folder"):
        protect_dataset(job(source, Path()))
    (tmp_path / "reference.reference").write_text("mine")
    with pytest.raises(OSError, match="reference_files: expected a folder that can be written"):
        protect_dataset(job(source, tmp_path / "reference", reference_files=True))


def test_a_disk_that_is_too_small(tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 100, 100))
    said = r"out: expected about 0\.\d MB of free space in .* for 6 pictures of 16x16, got 0\.0 MB"
    with pytest.raises(OSError, match=said) as caught:
        protect_dataset(job(made.write_csv(tmp_path / "in"), tmp_path / "out"))
    assert caught.value.errno == errno.ENOSPC, "so that the command says to make room"


def test_the_space_that_is_expected_is_about_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made.write_csv(tmp_path / "in", n=40)
    seen: list[float] = []
    monkeypatch.setattr("ccu_fast.mem.publish.rehearse.size_text", lambda count: seen.append(count) or "")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
        with pytest.raises(OSError):
            protect_dataset(job(source, tmp_path / "out"))
    protect_dataset(job(source, tmp_path / "out"))
    files = [path for path in (tmp_path / "out").rglob("*.png")]
    written = 40 * 768 + sum(path.stat().st_size + 4096 for path in files)
    assert seen[0] == pytest.approx(written, rel=0.02)


# What is left of a run before


def test_mended_data_and_other_settings_where_nothing_was_made(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    (tmp_path / "in" / "pictures" / "2.png").write_text("no picture")
    assert len(refused(job(source, tmp_path / "out"))) == 1
    (tmp_path / "in" / "pictures" / "2.png").unlink()
    source.write_text("".join(source.open(newline="").readlines()[:3] + source.open(newline="").readlines()[4:]))
    protect_dataset(job(source, tmp_path / "out", seed=3))


def test_skip_bad_after_rounds_were_made_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made.write_csv(tmp_path / "in")
    with monkeypatch.context() as full:
        full.setattr(job_module, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
        with pytest.raises(OSError) as caught:
            protect_dataset(job(source, tmp_path / "out"))
    assert caught.value.__notes__ == [f"all rounds are kept in {tmp_path}/out.partial, where the same command goes on"]
    monkeypatch.setattr(inspection, "scan", lambda *_: pytest.fail("looked again"))
    protect_dataset(job(source, tmp_path / "out", skip_bad=True))


@pytest.mark.parametrize(
    "change", [("digits zero three", "digits"), ("caption", "text"), ("pictures/1.", "pictures/2.")]
)
def test_a_table_that_changes_meanwhile_is_told_and_published_once_put_back(
    tmp_path: Path, change: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made.write_csv(tmp_path / "in")
    before = source.read_bytes()
    inner = job_module.write_metadata

    def changed(*arguments: Any) -> Any:
        source.write_bytes(before.replace(change[0].encode(), change[1].encode()))
        return inner(*arguments)

    with monkeypatch.context() as editor:
        editor.setattr(job_module, "write_metadata", changed)
        with pytest.raises(ValueError, match=r"input: expected the rows of .*, got another record \d; put it back as"):
            protect_dataset(job(source, tmp_path / "out"))
    source.write_bytes(before)
    monkeypatch.setattr(Protection, "advance", lambda *_: pytest.fail("a batch was done again"))
    protect_dataset(job(source, tmp_path / "out"))


def test_what_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="out: expected the folder of an unfinished run"):
        protect_dataset(job(source, tmp_path / "out", fresh=True))
    (partial / "run.json").write_text("{}")
    (partial / "checkpoint.json").write_text('{"round": 1}')
    (partial / "round-00001").mkdir()
    protect_dataset(job(source, tmp_path / "out", fresh=True))
    assert tree(partial) == {"mine.txt": b"keep"}


def test_a_dataset_that_cannot_be_moved_is_told_and_moved_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made.write_csv(tmp_path / "in")
    inner = os.replace

    def full(old: Any, new: Any) -> None:
        if Path(old).name == "publish":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").touch()
        inner(old, new)

    with monkeypatch.context() as other:
        other.setattr(os, "replace", full)
        with pytest.raises(OSError) as caught:
            protect_dataset(job(source, tmp_path / "out"))
    (note,) = caught.value.__notes__
    assert note.startswith(
        f"the protected dataset is whole in {tmp_path}/out.partial/publish; the same command moves it"
    )
    assert list_pairs(tmp_path / "out.partial" / "publish").n_images == 6
    (tmp_path / "out" / "mine").unlink()
    protect_dataset(job(source, tmp_path / "out"))
    assert torch.equal(list_pairs(tmp_path / "out").image_of, list_pairs(source).image_of)


def test_files_that_somebody_put_into_the_unfinished_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made.write_csv(tmp_path / "in")
    inner = job_module.write_manifest

    def with_another(folder: Path, *arguments: Any, **options: Any) -> None:
        inner(folder, *arguments, **options)
        (folder / ".DS_Store").touch()

    with monkeypatch.context() as finder:
        finder.setattr(job_module, "write_manifest", with_another)
        with pytest.raises(ValueError, match=r"out: expected the files that were written .* got \.DS_Store more"):
            protect_dataset(job(source, tmp_path / "out"))
    (tmp_path / "out.partial" / "publish" / ".DS_Store").unlink()
    protect_dataset(job(source, tmp_path / "out"))
