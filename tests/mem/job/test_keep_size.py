"""Protecting a dataset whose pictures keep their size: every format, resumable, within memory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccu_fast.data.captions import DiskSource, list_pairs
from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.job import Job, inspection, protect_dataset
from ccu_fast.mem.job import protect as job_module
from ccu_fast.mem.job.models import choose_model, small
from ccu_fast.mem.publish import writer as writer_module
from ccu_fast.mem.publish.whole import with_noise
from ccu_fast.ops.noise_store.api import NoiseStore
from tests.mem.job.test_protect import captured, kill_at
from tests.support import mem_datasets as made
from tests.support.forked import in_child, on_ranks
from tests.support.mem_datasets import WRITERS
from tests.support.mem_jobs import SHAPE, TINY, tree
from tests.support.mem_jobs import job as thumbnails
from tests.support.peak import printed_bytes

SIZES = [(16, 16), (40, 30), (20, 61), (5, 7), (300, 18), (90, 90)]
pytestmark = pytest.mark.usefixtures("one_thread")
job = partial(thumbnails, thumbnails=False)


@pytest.fixture(autouse=True)
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets' pictures have several sizes; one is grey, and one has an alpha channel."""

    def picture(number: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        image = image.resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)
        return image.convert({2: "L", 4: "RGBA"}.get(number % 6, "RGB"))

    monkeypatch.setattr(made, "picture", picture)


@pytest.mark.parametrize("format", WRITERS)
def test_the_published_pixels_are_what_was_optimised(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = captured(monkeypatch)
    source = WRITERS[format](tmp_path / "in")
    manifest = protect_dataset(job(source, tmp_path / "out"))
    clean, published = list_pairs(source), list_pairs(tmp_path / "out")
    assert (published.format, published.bad) == (format, []) and torch.equal(published.image_of, clean.image_of)
    run = seen[0]
    largest = 0
    of = {name: image for image, name in enumerate(published.names)}
    originals, readers = (DiskSource(listing, SHAPE, threads=1) for listing in (clean, published))
    for image, name in enumerate(clean.names):
        original, written = originals.whole(image), readers.whole(of[name])
        assert np.array_equal(written.pixels, with_noise(original, run.noise_of(image)).pixels)
        assert written.pixels.shape == original.pixels.shape
        largest = max(largest, int(np.abs(written.pixels.astype(int) - original.pixels).max()))
    assert 0 < largest == manifest["measured"]["eps_255"] <= 8
    assert {readers.whole(i).pixels.shape[2] for i in range(6)} == {1, 3, 4}
    assert manifest["thumbnails"] is None and manifest["pictures"] == {}
    files = {name: data for name, data in tree(tmp_path / "out").items() if name not in ("manifest.json", "README.md")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == manifest["sha256"]


def test_a_shards_json_has_the_true_size(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    protect_dataset(job(made.write_shards(tmp_path / "in"), tmp_path / "out", method=Method.parse("random")))
    urls = [str(tmp_path / "out" / f"{i:05d}.tar") for i in range(2)]
    for i, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
        about = json.loads(sample["json"])
        assert about["width"] == SIZES[i][0] and about["sha256"] == hashlib.sha256(sample["png"]).hexdigest()


@pytest.mark.parametrize("method", ["clean", "random-3", "text-noise", "em", "trigger-3", "uap", "tap", "tap-targeted"])
def test_methods(tmp_path: Path, method: str) -> None:
    source = made.write_csv(tmp_path / "in")
    manifest = protect_dataset(job(source, tmp_path / "out", method=Method.parse(method)))
    changed = manifest["measured"]["eps_255"] > 0
    assert changed == (method not in ("clean", "trigger-3")) and manifest["measured"]["eps_255"] <= 8
    for i, size in enumerate(SIZES):
        assert Image.open(tmp_path / "out" / "pictures" / f"{i}.png").size == size


def test_of_pictures_of_the_models_size_the_centre_crop_is_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other windows the same run as of thumbnails, but for the clip, which these pictures do not meet."""

    def picture(number: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
        return Image.fromarray(np.random.default_rng(number).integers(40, 216, (16, 16, 3), dtype=np.uint8))

    monkeypatch.setattr(made, "picture", picture)
    source = made.write_csv(tmp_path / "in")
    settings = Settings(**{**TINY.__dict__, "view_area": 1.0})
    for name, make in (("kept", job), ("thumbnails", thumbnails)):
        protect_dataset(make(source, tmp_path / name, settings=settings))
    kept, cut = (tree(tmp_path / name) for name in ("kept", "thumbnails"))
    assert json.loads(cut.pop("manifest.json"))["thumbnails"] == [16, 16] and kept.pop("manifest.json")
    assert b"16" in cut.pop("README.md") and kept.pop("README.md")
    assert kept == cut


MOMENTS = {
    "while looking at the pictures": (inspection, "scan", 1),
    "in the second round": (NoiseStore, "scatter_", 3),
    "when its noise is written": (NoiseStore, "save", 2),
    "in the middle of the export": (writer_module.Publisher, "_place", 4),
    "before the manifest": (job_module, "write_manifest", 1),
}


def test_killed_at_any_moment_the_same_call_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "CHUNK", 3)
    source = made.write_csv(tmp_path / "in")
    protect_dataset(job(source, tmp_path / "whole"))
    for number, (moment, place) in enumerate(MOMENTS.items()):
        task = job(source, tmp_path / moment, noise_on_disk=number % 2 == 1)

        def killed(task: Job = task, place: Any = place) -> None:
            kill_at(*place)()
            protect_dataset(task)

        status = in_child(killed)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
        protect_dataset(task)
        assert tree(tmp_path / moment) == tree(tmp_path / "whole"), moment


def shared(task: Job, rank: int) -> dict[str, Any]:
    return protect_dataset(task)


def test_processes_share_a_run(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    task = job(source, tmp_path / "out")
    manifests = on_ranks(2, tmp_path, partial(shared, task))
    assert manifests[0] == manifests[1] and manifests[0]["images"] == 6
    assert 0 < manifests[0]["measured"]["eps_255"] <= 8
    assert [Image.open(tmp_path / "out" / "pictures" / f"{i}.png").size for i in range(6)] == SIZES


def test_bad_pictures_are_left_out_and_the_others_keep_their_sizes(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    (tmp_path / "in" / "pictures" / "1.png").write_bytes(b"no picture")
    manifest = protect_dataset(job(source, tmp_path / "out", skip_bad=True))
    assert manifest["skipped"]["count"] == 1
    for i in (0, 2, 3, 4, 5):
        assert Image.open(tmp_path / "out" / "pictures" / f"{i}.png").size == SIZES[i]


def test_a_picture_that_changes_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made.write_csv(tmp_path / "in")
    inner = inspection.scan

    def then_changed(*arguments: Any, **options: Any) -> Any:
        found = inner(*arguments, **options)
        Image.new("RGB", (40, 30)).save(tmp_path / "in" / "pictures" / "1.png")
        return found

    monkeypatch.setattr(inspection, "scan", then_changed)
    with pytest.raises(ValueError, match=r"1\.png: changed since it was checked"):
        protect_dataset(job(source, tmp_path / "out"))


def test_room_on_the_disk_is_that_of_the_whole_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made.write_csv(tmp_path / "in")
    full = type("Usage", (), {"free": 20_000})()
    monkeypatch.setattr("ccu_fast.mem.publish.rehearse.shutil.disk_usage", lambda _: full)
    with pytest.raises(OSError, match=r"for 6 pictures of 0\.0 million pixels together, got"):
        protect_dataset(job(source, tmp_path / "out"))


def test_what_needs_thumbnails_is_refused(tmp_path: Path) -> None:
    for name, options in (
        ("compat", {"settings": Settings(compat=True)}),
        ("reference_files", {"reference_files": True}),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected with thumbnails \(--size HEIGHTxWIDTH\) alone"):
            job(tmp_path, tmp_path / "out", **options)


def test_the_grid_may_be_finer_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = captured(monkeypatch)
    settings = Settings(**{**TINY.__dict__, "grid": 2})
    protect_dataset(job(made.write_csv(tmp_path / "in"), tmp_path / "out", settings=settings))
    assert seen[0].store.item_shape == (3, 32, 32)


def test_grey_noise_for_a_grey_model(tmp_path: Path) -> None:
    model = partial(small, image_shape=(1, 16, 16), width=32)
    source = made.write_csv(tmp_path / "in")
    protect_dataset(Job(source, tmp_path / "out", model, settings=TINY, threads=2))
    original, published = (
        np.asarray(Image.open(tmp_path / f / "pictures" / "1.png")).astype(int) for f in ("in", "out")
    )
    inside = (original > 8).all(2) & (original < 247).all(2)
    change = (published - original)[inside]
    assert change.any() and (change == change[:, :1]).all()


def test_24_megapixels_in_little_memory(tmp_path: Path) -> None:
    """A picture of 24 MP has 72 MB of pixels, which are alive a few times in each of two threads, and the packages take
    0.3 GB. In one piece SSIM alone would take 3 GB a picture. The bound is 1.5 GB for everything."""
    for i in range(2):
        image = Image.new("RGB", (6000, 4000) if i else (4000, 6000), (90 + i, 120, 200))
        image.save(tmp_path / f"{i}.png", compress_level=1)
        (tmp_path / f"{i}.txt").write_text(made.caption(i))
    code = f"""
from functools import partial
from pathlib import Path
from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.job import Job, protect_dataset
from ccu_fast.mem.job.models import small
settings = Settings(eps=8, step=4, pgd_steps=2, rounds=1, surrogate_steps=1, batch=2)
model = partial(small, image_shape=(3, 64, 64), width=32)
folder = Path({str(tmp_path)!r})
protect_dataset(Job(folder, folder.with_name("out"), model, Method.parse("em"), settings, threads=2))
print(peak())
"""
    assert 0.3e9 < printed_bytes(code, timeout=900) < 1.5e9


def test_a_model_with_an_input_of_its_own_takes_that_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ccu_fast.mem.job import models

    made_of = small(["a photo"], (3, 32, 48))
    monkeypatch.setattr(models, "named_model", lambda spec, checkpoint: made_of)
    assert choose_model("open_clip:RN50", size="32x48")(["a photo"]).image_shape == (3, 32, 48)
    with pytest.raises(ValueError, match="size: expected 32x48, the input of 'open_clip:RN50', got 48x32"):
        choose_model("open_clip:RN50", size="48x32")(["a photo"])
