"""``ccu-fast verify``: its lines, its exit status, and the page of pairs."""

from __future__ import annotations

import base64
import errno
import html
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccu_fast.cli import main as cli
from ccu_fast.mem.job import protect_dataset
from ccu_fast.mem.verification.shown import GAIN
from tests.support import mem_datasets as made
from tests.support.mem_jobs import job

ODD = {
    0: "<script>alert('a & b')</script>",
    1: "صورة لقطة حمراء",
    2: "\u202eturned\u202c <img src=x onerror=alert(1)>",
    3: 'an "attribute" & an &amp; entity {{ 7 * 7 }}',
    4: "w" * 400,
    5: "日本語の写真",
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``in`` and ``out``, with captions that a page could stumble over; pictures of 16×16."""
    root = tmp_path_factory.mktemp("verify")
    source = made.write_folder(root / "in")
    for i, text in ODD.items():
        (source / ("deep" if i % 2 else "") / f"{i}.txt").write_text(text + "\n")
    protect_dataset(job(source, root / "out"))
    return root


ALT = {"original": "The original of", "protected": "as it will be published", "noise": "Their difference"}


def ends(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = cli.main(["verify", *map(str, words)])
    told = capsys.readouterr()
    return status, told.out, told.err


# What a log is told of; later lines of a stage have other counts.
STAGES = ["reading the dataset", "hashing files", "reading pictures"]


def stages(err: str) -> list[str]:
    return list(dict.fromkeys(re.sub(r" \d+/\d+.*|, .*", "", line) for line in err.splitlines()))


def test_one_line_for_each_check(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = ends(capsys, data / "out", "--original", data / "in")
    assert (status, stages(err)) == (0, STAGES)
    lines = out.splitlines()
    names = ["manifest", "files", "hashes", "pictures", "captions", "pairs", "noise", "triggers", "datasets"]
    assert [line.split()[0] for line in lines] == names
    assert all(line.split()[1] == "ok" for line in lines[:-1]) and lines[-1].split()[1:3] == ["not", "done"]
    assert re.fullmatch(r"noise       ok        largest change 8/255 \(.*png\), allowed 8/255", lines[6])
    status, out, _ = ends(capsys, data / "out")
    assert status == 0 and out.count("not done") == 4
    assert ends(capsys, data / "out", "--quiet") == (0, "", "")


def test_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = ends(capsys, data / "out", "--original", data / "in", "--json", "--threads", 1)
    found = json.loads(out)
    assert (status, err, found["passed"]) == (0, "", True)
    assert found["checks"]["captions"] == {"passed": True, "told": "6 captions", "problems": [], "count": 0}


def test_the_wrong_original_is_compared_with_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, page = made.write_folder(tmp_path / "other"), tmp_path / "page.html"
    for path in [path for path in other.rglob("*") if path.is_file()]:
        path.rename(path.with_name(f"new-{path.name}"))
    status, out, err = ends(capsys, data / "out", "--original", other, "--preview", page)
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if not line.startswith(" ")}
    assert status == 1 and said["pairs"].startswith("FAILED")
    assert all(said[name].startswith("not done  no published picture") for name in ("noise", "triggers"))
    assert f"{page} was not written, because" in err and not page.exists()


def test_damage_is_told_and_is_status_1(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [f"{i}.png" for i in range(12)] + ["caf\udce9\x1b[31m"]:
        (data / "out" / "more").mkdir(exist_ok=True)
        (data / "out" / "more" / name).write_bytes(b"")
    try:
        status, out, err = ends(capsys, data / "out", "--original", data / "in")
        assert (status, stages(err)) == (1, STAGES) and "\x1b" not in out
        assert "files       FAILED" in out and "  more/0.png: not in the manifest" in out and "  and 3 more" in out
        status, out, _ = ends(capsys, data / "out", "--quiet")
        assert status == 1 and out.splitlines()[0].startswith("files       FAILED")
        assert "manifest  " not in out
        page = tmp_path / "page.html"
        status, out, _ = ends(capsys, data / "out", "--json", "--preview", page, "--original", data / "in")
        assert status == 1 and json.loads(out)["checks"]["files"]["count"] == 13
        assert "not in the manifest" in page.read_text(), "the page tells of it"
    finally:
        for path in (data / "out" / "more").iterdir():
            path.unlink()
        (data / "out" / "more").rmdir()


class Page(HTMLParser):
    """The tags, the pictures by what they show, and the texts that browsers show in paragraphs with a direction."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: dict[str, list[np.ndarray]] = {"original": [], "protected": [], "noise": []}
        self.captions: list[str] = []
        self._caption = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attributes)
        self._caption = tag == "p" and found.get("dir") == "auto"
        if self._caption:
            self.captions.append("")
        if tag == "img":
            source = str(found["src"])
            assert source.startswith("data:image/png;base64,") and set(found) == {"alt", "src"}
            png = base64.b64decode(source.partition(",")[2])
            kind = next(kind for kind, words in ALT.items() if words in str(found["alt"]))
            self.pictures[kind].append(np.array(Image.open(io.BytesIO(png))))

    def handle_endtag(self, tag: str) -> None:
        self._caption = self._caption and tag != "p"

    def handle_data(self, text: str) -> None:
        if self._caption:
            self.captions[-1] += text


def test_the_page_of_pairs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "preview.html"
    status, _, err = ends(capsys, data / "out", "--original", data / "in", "--preview", path)
    assert (status, stages(err)) == (0, [*STAGES, "writing the page"])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe"} & set(page.tags), "nothing runs, nothing is loaded"
    assert "://" not in text.replace("arxiv.org", "")
    assert "This page holds originals: do not publish it." in text
    assert {len(shown) for shown in page.pictures.values()} == {6}
    before = [page.captions[i] for i in range(0, 12, 2)]
    assert sorted(before) == sorted(ODD.values())
    for clean, published in zip(before, page.captions[1::2], strict=True):
        assert published.endswith(f" {clean}") and len(published) > len(clean) + 1
    assert html.escape(ODD[0], quote=False).replace("'", "&#39;") in text
    for clean, protected, noise in zip(*page.pictures.values(), strict=True):
        change = protected.astype(int) - clean
        assert np.abs(change).max() == 8
        assert np.array_equal(noise, np.clip(128 + GAIN * change, 0, 255))
    similar = [float(value) for value in re.findall(r"SSIM (0\.\d+),", text)]
    assert len(similar) == 6 and similar == sorted(similar)
    assert [text.count(f"{word}, SSIM") for word in ("worst", "median", "best")] == [1, 1, 1]
    assert ends(capsys, data / "out", "--original", data / "in", "--preview", path, "--pairs", 2)[0] == 0
    assert path.read_text().count("<figure>") == 6


def test_large_pictures_are_thumbnails_and_noise_is_not_smoothed_away(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(data / "in", source)
    shutil.copytree(data / "out", out)
    rng = np.random.default_rng(0)
    for i in range(6):
        name = f"deep/{i}.png" if i % 2 else f"{i}.png"
        pixels = rng.integers(100, 110, (300, 700, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / name)
        Image.fromarray(pixels + np.where(rng.random(pixels.shape) < 0.5, 8, 248).astype(np.uint8)).save(out / name)
    told = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**told, "thumbnails": None}))
    path = tmp_path / "page.html"
    status, told, _ = ends(capsys, out, "--original", source, "--preview", path, "--pairs", 3)
    assert status == 1 and told.count("FAILED") == 1, "the hashes"
    page = Page(path.read_text())
    for shown in page.pictures.values():
        assert [picture.shape for picture in shown] == [(110, 256, 3)] * 3
    assert {int(value) for picture in page.pictures["noise"] for value in np.unique(picture)} == {48, 208}
    assert "700 × 300 px" in path.read_text()


def test_pictures_too_small_for_ssim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = made.write_folder(tmp_path / "in"), tmp_path / "out"
    protect_dataset(job(source, out))
    for i in range(6):
        name = f"deep/{i}.png" if i % 2 else f"{i}.png"
        Image.new("L", (9, 5), 100).save(source / name)
        Image.new("L", (9, 5), 100 + i).save(out / name)
    page = tmp_path / "page.html"
    assert ends(capsys, out, "--original", source, "--preview", page)[0] == 1, "the hashes"
    text = page.read_text()
    assert text.count("too small for SSIM") == 6
    assert re.findall(r"largest change (\d)/255, 9", text) == list("543210")


def test_what_can_be_mended_is_one_message(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, out, source = tmp_path / "page.html", data / "out", data / "in"
    for words, message in (
        *(
            ([path], f"folder: expected the folder of a published dataset, got {path}, which {why}\n")
            for path, why in ((tmp_path / "nowhere", "does not exist"), (out / "manifest.json", "is not a folder"))
        ),
        ([out, "--original", tmp_path / "nowhere"], "--original: expected a file or folder, got"),
        ([out, "--preview", page], "--preview: expected with --original"),
        ([out, "--original", source, "--preview", out / "page.html"], "--preview: expected a file outside the data"),
        ([out, "--original", source, "--preview", tmp_path], "--preview: expected a file, got the folder"),
    ):
        status, told, err = ends(capsys, *words)
        assert (status, told) == (1, "")
        assert err.startswith(f"ccu-fast verify: {message}") and err.count("\n") == 1
    assert not page.exists() and not (out / "page.html").exists()


def test_a_page_that_cannot_be_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "page.html")

    monkeypatch.setattr("ccu_fast.cli.report.page.write_whole", full)
    words = [data / "out", "--original", data / "in", "--preview", tmp_path / "page.html"]
    status, out, err = ends(capsys, *words)
    assert status == 1 and "noise       ok" in out
    assert err.endswith("make room and give the same command again; what was found is above\n")
