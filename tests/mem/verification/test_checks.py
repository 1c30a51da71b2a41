"""Every kind of damage to a published dataset is found, and nothing is found in a whole one."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import ccu_fast.mem
from ccu_fast.data.pictures import decode
from ccu_fast.mem.config import Method
from ccu_fast.mem.fidelity import ssim
from ccu_fast.mem.job import protect_dataset
from ccu_fast.mem.verification import libraries, originals, verify
from ccu_fast.mem.verification.originals import Distance, similarity
from ccu_fast.mem.verification.shown import choose
from ccu_fast.runs.provenance import file_hash
from tests.support import mem_datasets as made
from tests.support.mem_datasets import WRITERS
from tests.support.mem_jobs import job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``FORMAT/in`` and ``FORMAT/out`` of every format."""
    root = tmp_path_factory.mktemp("verification")
    for format, write in WRITERS.items():
        protect_dataset(job(write(root / format / "in"), root / format / "out"))
    return root


@pytest.fixture
def pair(published: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A copy of a published dataset, to be damaged, and its original."""

    def copied(format: str) -> tuple[Path, Path]:
        shutil.copytree(published / format / "out", tmp_path / format)
        source = published / format / "in"
        return tmp_path / format, source / "train.csv" if format == "csv" else source

    return copied


def failed(found: dict[str, Any]) -> set[str]:
    json.dumps(found)
    assert found["passed"] == all(check["passed"] is not False for check in found["checks"].values())
    for check in found["checks"].values():
        assert (check["passed"] is False) == (check["count"] > 0)
        assert len(check["problems"]) == min(check["count"], 10)
    return {name for name, check in found["checks"].items() if check["passed"] is False}


def said(found: dict[str, Any], name: str) -> str:
    return "\n".join(found["checks"][name]["problems"])


def edit(folder: Path, **values: Any) -> None:
    """The manifest with other values."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sign(folder: Path) -> None:
    """The hashes as they are now, so that no other check but theirs would find a change."""
    edit(folder, sha256={str(p.relative_to(folder)): file_hash(p) for p in files(folder)})


def files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("manifest.json", "README.md"))


def rewritten(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


@pytest.mark.parametrize("format", WRITERS)
def test_what_was_published_passes(format: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair(format)
    found = verify(out, source, threads=2)
    assert failed(found) == set(), found
    checks = found["checks"]
    library = "webdataset" if format == "webdataset" else "datasets"
    assert list(checks) == [
        *("manifest", "files", "hashes", "pictures", "captions", "pairs", "noise", "triggers"),
        library,
    ]
    assert all(check["passed"] for name, check in checks.items() if name != "datasets")
    assert "6 pictures of 16x16" in checks["pictures"]["told"]
    rows = 7 if format in ("csv", "folder") else 6
    assert checks["captions"]["told"] == f"{rows} captions"
    assert checks["noise"]["told"].startswith("largest change 8/255 (") and "allowed 8/255" in checks["noise"]["told"]
    assert checks["triggers"]["told"] == f"3 words in front of {rows} original captions"
    if format == "webdataset":
        assert checks["webdataset"]["told"] == "6 samples, 6 pictures"
    alone = verify(out)
    assert failed(alone) == set()
    assert [name for name in ("pairs", "noise", "triggers") if alone["checks"][name]["passed"] is not None] == []


@pytest.mark.parametrize("format", WRITERS)
def test_a_missing_file(format: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair(format)
    lost = next(p for p in files(out) if p.suffix in (".png", ".tar"))
    lost.unlink()
    found = verify(out, source)
    assert {"files", "pictures"} <= failed(found)
    assert said(found, "files") == f"{lost.relative_to(out)}: not there"


@pytest.mark.parametrize("name", ["pictures/thumbnail.jpg", ".DS_Store", "new/notes.txt"])
def test_a_file_that_does_not_belong_there(name: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("csv")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"x")
    found = verify(out, source)
    assert failed(found) == {"files"}
    assert said(found, "files").startswith(f"{name}: not in the manifest")


def test_links_are_files_that_do_not_belong_there(pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("csv")
    (out / "to a folder").symlink_to(source.parent)
    (out / "to nothing").symlink_to("nowhere")
    found = verify(out, source)
    assert failed(found) == {"files"} and found["checks"]["files"]["count"] == 2


@pytest.mark.parametrize("format", WRITERS)
def test_a_changed_byte(format: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair(format)
    for path in files(out):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        found = verify(out, source)
        assert "hashes" in failed(found)
        assert said(found, "hashes") == f"{path.relative_to(out)}: another SHA-256 than the manifest's, it has changed"
        path.write_bytes(before)
    assert failed(verify(out, source)) == set()


@pytest.mark.parametrize(
    "change",
    [
        lambda text, clean: text.replace(clean, clean.upper()),
        lambda text, clean: text.replace(f" {clean}", clean),
        lambda text, clean: clean,
        lambda text, clean: f"one {text}",
        lambda text, clean: text.replace(" ", "  ", 1),
    ],
    ids=["another", "no space", "no trigger", "a word more", "an empty word"],
)
def test_a_changed_caption(change: Callable[[str, str], str], pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("folder")
    text = (out / "2.txt").read_text().rstrip("\n")
    changed = change(text, made.caption(2))
    assert changed != text
    (out / "2.txt").write_text(changed + "\n")
    sign(out)
    found = verify(out, source)
    assert failed(found) == {"triggers"}
    assert said(found, "triggers") == f"2.png: expected 3 trigger words and {made.caption(2)!r}, got {changed!r}"


@pytest.mark.parametrize("format", ["csv", "folder", "imagefolder"])
def test_a_pixel_beyond_eps(format: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair(format)
    path = next(p for p in files(out) if p.name == "3.png")
    clean = np.array(made.picture(3)).astype(int)

    def beyond(pixels: np.ndarray) -> np.ndarray:
        y, x = np.argwhere(clean[..., 1] < 240)[0]
        pixels[y, x, 1] = clean[y, x, 1] + 9
        return pixels

    rewritten(path, beyond)
    sign(out)
    found = verify(out, source)
    name = str(path.relative_to(out))
    assert failed(found) == {"noise"}
    assert said(found, "noise") == f"{name}: a pixel is changed by 9/255, allowed are 8/255"
    assert found["checks"]["noise"]["told"] == f"largest change 9/255 ({name}), allowed 8/255"


def test_a_picture_that_was_never_protected_or_is_broken(pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("folder")
    whole = (out / "4.png").read_bytes()
    for broken in (b"no picture", whole[:200], b""):
        (out / "4.png").write_bytes(broken)
        sign(out)
        found = verify(out, source)
        assert failed(found) == {"pictures"}
        assert said(found, "pictures").startswith("4.png: ")
    (out / "4.png").write_bytes(made.encoded(99))
    sign(out)
    assert failed(verify(out, source)) == {"noise"} and failed(verify(out)) == set()


def test_a_missing_row(pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("csv")
    with (out / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    with (out / "train.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\r\n").writerows(rows[:-1])
    sign(out)
    found = verify(out, source)
    assert {"captions", "pairs"} <= failed(found) <= {"captions", "pairs"}
    assert said(found, "captions") == "expected 7 captions, as the manifest says, got 6"
    assert said(found, "pairs") == "pictures/0.png: expected 2 captions, as the original has, got 1"
    with (out / "train.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\r\n").writerows([rows[0], *rows[2:-1], [*rows[-1][:1], "", ""]])
    found = verify(out, source)
    assert failed(found) == {"hashes", "pictures", "captions", "pairs"}
    assert "record 6" in said(found, "captions")
    assert "pictures/0.png: not published, nor left out" in said(found, "pairs")


def test_a_table_that_is_none(pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("csv")
    (out / "train.csv").write_bytes(b"\xff\xfe")
    found = verify(out, source)
    assert failed(found) == {"hashes", "captions"} and "expected UTF-8" in said(found, "captions")


def test_a_damaged_shard(pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("webdataset")
    shard = out / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    sign(out)
    found = verify(out, source)
    assert {"pictures", "captions", "pairs"} <= failed(found)
    assert "unreadable shard" in said(found, "captions")


def test_what_webdataset_reads_is_counted(pair: Callable[[str], tuple[Path, Path]]) -> None:
    pytest.importorskip("webdataset")
    out, source = pair("webdataset")
    with tarfile.open(out / "00000.tar") as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    with tarfile.open(out / "00000.tar", "w") as archive:
        for name, data in members.items():
            if name != "000000001.png":
                made.add_member(archive, name, data)
    sign(out)
    found = verify(out, source)
    assert "webdataset" in failed(found) and said(found, "webdataset") == "expected 6 pictures, got 5"
    with tarfile.open(out / "00000.tar", "w") as archive:
        for name, data in [*members.items(), *list(members.items())[-1:]]:
            made.add_member(archive, name, data)
    sign(out)
    assert "webdataset stops after 2 samples" in said(verify(out, source), "webdataset")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected manifest.json in"),
        ("{", "expected manifest.json to be JSON"),
        ("[]", "got other things as no object"),
        ('{"sha256": {}}', "got other things as run, rows, images, max_pixels, method, settings"),
    ],
)
def test_a_manifest_that_is_none(content: str | None, message: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("csv")
    (out / "manifest.json").unlink()
    if content is not None:
        (out / "manifest.json").write_text(content)
    found = verify(out, source)
    assert failed(found) == {"manifest"} == set(found["checks"])
    assert message in said(found, "manifest")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("columns", ["images"]),
        ("format", "zip"),
        ("settings", {"eps": "8"}),
        ("method", {}),
        ("skipped", {"items": [3]}),
        ("sha256", {"train.csv": 3}),
        ("rows", "7"),
    ],
)
def test_a_manifest_with_another_value(name: str, value: Any, pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("csv")
    edit(out, **{name: value})
    found = verify(out, source)
    assert failed(found) == {"manifest"} and said(found, "manifest").endswith(f"got other things as {name}")


def test_a_manifest_that_leads_out_of_the_folder(pair: Callable[[str], tuple[Path, Path]]) -> None:
    out, source = pair("csv")
    (out.parent / "outside").write_text("x")
    manifest = json.loads((out / "manifest.json").read_text())
    edit(out, sha256={**manifest["sha256"], "../outside": file_hash(out.parent / "outside"), "/etc/passwd": "x"})
    found = verify(out, source)
    assert failed(found) == {"files"} and said(found, "files").count("leads out of the folder") == 2


def test_ten_problems_are_told_and_all_are_counted(tmp_path: Path) -> None:
    source = made.write_folder(tmp_path / "in", n=13)
    protect_dataset(job(source, tmp_path / "out", method=Method.parse("random")))
    for path in (tmp_path / "out").rglob("*.png"):
        path.write_bytes(b"")
    sign(tmp_path / "out")
    check = verify(tmp_path / "out", source)["checks"]["pictures"]
    assert (len(check["problems"]), check["count"]) == (10, 13)


def test_methods_without_noise_or_without_words(tmp_path: Path) -> None:
    source = made.write_folder(tmp_path / "in")
    for name, told in (("trigger-2", "0/255 (0.png), allowed 0/255"), ("em", "8/255 (0.png), allowed 8/255")):
        out = tmp_path / name
        protect_dataset(job(source, out, method=Method.parse(name)))
        found = verify(out, source)
        assert failed(found) == set() and found["checks"]["noise"]["told"] == f"largest change {told}"
    (out / "0.txt").write_text((out / "0.txt").read_text().replace("a photo", "one photo", 1))
    sign(out)
    assert failed(verify(out, source)) == {"triggers"}


def test_what_was_left_out_is_no_problem(tmp_path: Path) -> None:
    source = made.write_folder(tmp_path / "in")
    (source / "2.png").write_bytes(b"no picture")
    (source / "deep" / "3.txt").write_text("\n")
    protect_dataset(job(source, tmp_path / "out", skip_bad=True))
    found = verify(tmp_path / "out", source)
    assert failed(found) == set() and found["checks"]["pairs"]["told"] == "4 pictures of 5"
    edit(tmp_path / "out", skipped={"count": 0, "items": []})
    assert said(verify(tmp_path / "out", source), "pairs").endswith(
        "2.png: not published, nor left out by the manifest"
    )


def test_the_wrong_original(pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    out, _ = pair("folder")
    other = made.write_folder(tmp_path / "other")
    for i in range(6):
        path = other / ("deep" if i % 2 else "") / f"{i}"
        path.with_suffix(".png").write_bytes(made.encoded(i + 50))
        path.with_suffix(".txt").write_text("something else\n")
    assert failed(verify(out, other)) == {"pairs", "noise", "triggers"}
    for path in other.rglob("*"):
        if path.is_file():
            path.rename(path.with_name(f"new-{path.name}"))
    found = verify(out, other)
    assert failed(found) == {"pairs"} and found["checks"]["pairs"]["count"] == 12
    for name in ("noise", "triggers"):
        check = found["checks"][name]
        assert check["passed"] is None and check["told"].startswith("no published picture"), check


def test_an_original_that_cannot_be_read(published: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(published / "folder" / "in", source)
    (source / "2.png").write_bytes(b"")
    (source / "4.png").unlink()
    (source / "4.png").symlink_to("nowhere")
    found = verify(published / "folder" / "out", source)
    assert failed(found) == {"noise"}
    assert said(found, "noise") == (
        "2.png: its original cannot be read: not a picture\n4.png: its original cannot be read: not there"
    )
    assert found["checks"]["noise"]["told"].startswith("largest change 8/255")


def test_what_cannot_be_done(pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    out, source = pair("folder")
    with pytest.raises(FileNotFoundError, match="folder: expected the folder of a published dataset"):
        verify(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="original: expected a file or folder"):
        verify(out, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="original: expected image-caption pairs, got none"):
        (tmp_path / "empty").mkdir()
        verify(out, tmp_path / "empty")
    with pytest.raises(ValueError, match="threads: expected"):
        verify(out, source, threads=0)
    with pytest.raises(ValueError, match="original: expected the dataset"):
        ccu_fast.mem.verification.verify_and_show(out, pairs=3)


@pytest.mark.parametrize("size", [(16, 16), (40, 24)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "16", "turned"])
def test_originals_are_compared_in_the_size_of_what_was_published(
    mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    """Pictures of 40×24 as they are, or in another size as protection reads them."""
    rng = np.random.default_rng(0)
    source, out = made.write_folder(tmp_path / "in"), tmp_path / "out"
    protect_dataset(job(source, out))
    for i in range(6):
        path = f"deep/{i}.png" if i % 2 else f"{i}.png"
        colours = rng.integers(20, 236, (24, 40, 3), dtype=np.uint8)
        if mode == "L":
            picture = Image.fromarray(colours[..., 0])
        elif mode == "16":
            picture = Image.fromarray(colours[..., 0].astype(np.uint16) * 257 + 30)
        elif mode == "RGBA":
            picture = Image.fromarray(np.concatenate([colours, colours[..., :1]], 2))
        else:
            picture = Image.fromarray(colours)
        exif = Image.Exif()
        if mode == "turned":
            exif[0x0112] = 6
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        picture.save(source / path, exif=exif)
        channels = 1 if mode in ("L", "16") else 3
        seen = decode((source / path).read_bytes(), (channels, size[1], size[0])).permute(1, 2, 0).numpy()
        changed = (seen + np.where(rng.random(seen.shape) < 0.5, -8, 8)).clip(0, 255).astype(np.uint8)
        if mode == "RGBA":
            alpha = colours[..., :1] if size == (40, 24) else np.zeros((*seen.shape[:2], 1), np.uint8)
            changed = np.concatenate([changed, alpha], 2)
        Image.fromarray(changed[..., 0] if channels == 1 else changed).save(out / path)
    edit(out, thumbnails=None if size == (40, 24) else [size[1], size[0]])
    sign(out)
    found = verify(out, source)
    assert failed(found) == set(), found
    assert found["checks"]["noise"]["told"].startswith("largest change 8/255")
    assert found["checks"]["pictures"]["told"] == f"6 pictures of {size[0]}x{size[1]}"


def test_at_most_one_picture_a_thread_is_decoded_at_once(
    pair: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = pair("folder")
    inside, most = [0], [0]
    distance = originals.distance

    def counted(*arguments: Any, **options: Any) -> Distance:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            return distance(*arguments, **options)
        finally:
            inside[0] -= 1

    monkeypatch.setattr("ccu_fast.mem.verification.checks.distance", counted)
    assert failed(verify(out, source, threads=1)) == set() and most == [1]


def test_similarity_is_ssim() -> None:
    rng = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (3, 50, 20), dtype=torch.uint8, generator=rng)
    b = (a.int() + torch.randint(-9, 10, a.shape, generator=rng)).clamp(0, 255).to(torch.uint8)
    assert similarity(a, b) == pytest.approx(float(ssim(a[None], b[None])), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "count", "places"),
    [
        (1, 5, {0: "worst"}),
        (2, 12, {0: "worst", 1: "best"}),
        (101, 3, {0: "worst", 50: "median", 100: "best"}),
        (101, 4, {0: "worst", 50: "median", 67: "", 100: "best"}),
        (100, 1, {0: "worst"}),
    ],
)
def test_the_pairs_that_are_shown(n: int, count: int, places: dict[int, str]) -> None:
    distances = {i: Distance(8, 1 - 0.001 * i) for i in range(n)}  # the last is the worst
    assert choose(distances, count) == [(n - 1 - place, name) for place, name in places.items()]
    assert choose({0: Distance(3, None), 1: Distance(9, None), 2: Distance(1, 0.5)}, 3) == [
        (2, "worst"),
        (1, "median"),
        (0, "best"),
    ]
    assert choose({}, 3) == []


class _Datasets:
    """What is asked of the library ``datasets``."""

    def __init__(self, rows: int, error: Exception | None = None) -> None:
        self.rows, self.error, self.asked, self.shown = rows, error, [], True  # type: ignore[var-annotated]

    def load_dataset(self, kind: str, **options: Any) -> dict[str, Any]:
        self.asked.append((kind, options))
        assert not self.shown
        if self.error is not None:
            raise self.error
        return {"train": iter(range(self.rows))}

    def are_progress_bars_disabled(self) -> bool:
        return not self.shown

    def disable_progress_bars(self) -> None:
        self.shown = False

    def enable_progress_bars(self) -> None:
        self.shown = True


def test_what_datasets_reads_is_counted(
    pair: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = _Datasets(7)
    real = libraries.importlib.import_module

    def imported(name: str) -> Any:
        return library if name == "datasets" else real(name)

    monkeypatch.setattr(libraries.importlib, "import_module", imported)
    out, source = pair("csv")
    found = verify(out, source)
    assert failed(found) == set() and found["checks"]["datasets"]["told"] == "7 records" and library.shown
    [(kind, options)] = library.asked
    assert (kind, options["data_files"], options["streaming"]) == ("csv", [str(out / "train.csv")], True)
    library.rows = 6
    assert said(verify(out, source), "datasets") == "expected 7 records, got 6"
    library.error = KeyError("what\nit says")
    assert said(verify(out, source), "datasets") == "datasets stops after 0 records: KeyError: 'what\\nit says'"
    assert library.shown
    out, source = pair("folder")
    assert "no reader" in verify(out, source)["checks"]["datasets"]["told"]


@pytest.mark.parametrize("format", ["csv", "imagefolder"])
def test_the_real_datasets(format: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    pytest.importorskip("datasets")
    out, source = pair(format)
    found = verify(out, source)
    rows = 7 if format == "csv" else 6
    assert failed(found) == set() and found["checks"]["datasets"]["told"] == f"{rows} records"
    if format == "imagefolder":
        next(out.glob("*.png")).unlink()
        assert "datasets" in failed(verify(out, source))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    source = made.write_folder(tmp_path / "in")
    protect_dataset(job(source, tmp_path / "out"))
    (tmp_path / "out" / "caf\udce9").write_bytes(b"")
    found = verify(tmp_path / "out", source)
    assert failed(found) == {"files"} and said(found, "files").startswith("caf\\udce9: not in")


def test_settings_of_the_authors_allow_any_words(tmp_path: Path) -> None:
    source = made.write_folder(tmp_path / "in")
    (source / "0.txt").write_text(made.caption(0) + "\n")  # one caption for each picture
    out = tmp_path / "out"
    protect_dataset(job(source, out))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "0.txt").write_text("four words come first " + made.caption(0) + "\n")
    sign(out)
    assert failed(verify(out, source)) == {"triggers"}
    edit(out, settings={**manifest["settings"], "compat": True})
    assert failed(verify(out, source)) == set()
    (out / "0.txt").write_text(made.caption(0) + "\n")
    sign(out)
    assert said(verify(out, source), "triggers").startswith("0.png: expected some trigger words and")


def test_pictures_that_keep_their_size_keep_their_form(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        picture = made.picture(i, (30 + i, 20)).convert("RGBA")
        picture.putalpha(100 + i)
        picture.save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(made.caption(i))
    out = tmp_path / "out"
    protect_dataset(job(source, out, method=Method.parse("trigger-2"), thumbnails=False))
    assert failed(verify(out, source, threads=1)) == set()
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "expected 30x20 as of its original, got 15x10": lambda picture: picture.resize((15, 10)),
        "expected 4 channels as of its original, got 3": lambda picture: picture.convert("RGB"),
        "expected the transparency of its original": lambda picture: picture.putalpha(7) or picture,  # type: ignore[func-returns-value]
    }
    kept = (out / "0.png").read_bytes()
    for message, change in changes.items():
        (out / "0.png").write_bytes(kept)
        change(Image.open(out / "0.png")).save(out / "0.png")
        sign(out)
        found = verify(out, source, threads=1)
        assert "pictures" in failed(found) and f"0.png: {message}" in said(found, "pictures")
    Image.open(source / "0.png").save(
        out / "0.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    sign(out)
    assert "pictures" in failed(verify(out, source, threads=1))


def test_thumbnails_have_the_size_of_the_manifest(pair: Callable[[str], tuple[Path, Path]]) -> None:
    folder, _ = pair("csv")
    picture = folder / "pictures" / "3.png"
    Image.open(picture).resize((8, 9)).save(picture)
    sign(folder)
    found = verify(folder, threads=1)
    assert failed(found) == {"pictures"} and said(found, "pictures") == "pictures/3.png: expected 16x16, got 8x9"


def test_version_0_1_0_published_thumbnails_without_saying_so(pair: Callable[[str], tuple[Path, Path]]) -> None:
    folder, source = pair("csv")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["thumbnails"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "versions": {"ccu_fast": "0.2.0"}}))
    assert "manifest" in failed(verify(folder, threads=1))
    edit(folder, versions={"ccu_fast": "0.1.0"})
    found = verify(folder, source, threads=1)
    assert failed(found) == set() and found["checks"]["pictures"]["told"].endswith("of 16x16")
