"""Export: lossless, complete or absent."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ccu_fast.mem import study
from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.fidelity import noise_report
from ccu_fast.mem.protection import Protected
from ccu_fast.mem.publish.memory import export
from tests.support.mem_datasets import read_export


def example(n: int = 5, channels: int = 1) -> Protected:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, 6, 9), generator=rng, dtype=torch.uint8)
    noise = torch.randint(-8, 9, images.shape, generator=rng, dtype=torch.int16).to(torch.int8)
    captions = [f'caption {i}, with "quotes",\nand lines' for i in range(n)]
    return Protected(Method.parse("mem"), Settings(), images, noise, torch.zeros(n, 3, dtype=torch.int64), captions)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_what_was_made(tmp_path: Path, channels: int) -> None:
    made = example(channels=channels)
    folder = export(made, tmp_path / "deep" / "out", seed=4)
    images, captions = read_export(folder)
    assert torch.equal(images, made.images)
    assert captions == made.captions
    assert sorted(p.name for p in folder.iterdir()) == ["captions.csv", "images", "manifest.json"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    with (folder / "captions.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["images", "caption"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["seed"], manifest["method"]["name"]) == (4, "mem")
    assert noise_report(made.noise).items() <= manifest.items()
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert len(manifest["sha256"]) == 5


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = (export(example(), tmp_path / name) for name in "ab")
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert len(files) == 7
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], existing: bool
) -> None:
    save, saved = Image.Image.save, []

    def failing(image: Image.Image, path: Any, **options: Any) -> None:
        if len(saved) == 3:
            raise error
        save(image, path, **options)
        saved.append(path)

    if existing:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(error):
        export(example(), tmp_path / "out")
    assert len(saved) == 3
    left = list(tmp_path.rglob("*"))
    assert left == ([tmp_path / "out"] if existing else [])


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("out", "file"):
        with pytest.raises(FileExistsError, match="new or empty folder"):
            export(example(), tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine.txt", "out"]


def test_the_bytes_are_those_of_the_first_format(tmp_path: Path) -> None:
    folder = export(example(), tmp_path / "out", seed=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["versions"], manifest["sha256"]  # of the machine: torch's version, Pillow's compression
    later = {
        "same_captions": False,
        "view_area": 0.8,
        "grid": 1,
        "first": "look",
        "words": "captions",
        "place": "front",
    }
    assert {name: manifest["settings"].pop(name) for name in later} == later  # which the first did not have
    assert manifest["settings"]["trigger_rounds"] is None
    manifest["settings"]["trigger_rounds"] = 3
    told = hashlib.sha256((json.dumps(manifest) + (folder / "captions.csv").read_text()).encode()).hexdigest()
    assert told == "c0030dfdb221fad5a5f6a9430e063bebe82214fe2dda28ae08ab88bc6b500453"


def test_psnr() -> None:
    assert noise_report(torch.zeros(3, 1, 2, 2, dtype=torch.int8)) == {"eps_255": 0, "psnr_db": None}
    assert noise_report(torch.zeros(0, 1, 2, 2, dtype=torch.int8)) == {"eps_255": 0, "psnr_db": None}
    eight = noise_report(torch.full((3, 1, 2, 2), -8, dtype=torch.int8))
    assert eight == {"eps_255": 8, "psnr_db": pytest.approx(30.07, abs=0.01)}
    assert noise_report(torch.tensor([[-128, 3]], dtype=torch.int8))["eps_255"] == 128


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        export(example(channels=2), tmp_path / "out")
    made = example()
    made.captions[1] = "\ud83d"
    with pytest.raises(ValueError, match=r"protected: expected captions of text, got half .* in caption 1"):
        export(made, tmp_path / "out")


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    export(example(), tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real" / "captions.csv").exists()


def test_a_study_tries_its_outputs_before_it_protects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "protect", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "em").mkdir()
    (tmp_path / "em" / "mine").touch()
    with pytest.raises(FileExistsError, match=r"out: expected a new or empty folder, got .*em"):
        study.run_digit_strips(methods=["clean", "em"], out=tmp_path, n_train=32, n_test=10)
