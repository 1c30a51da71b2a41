"""Small datasets of every format, written for a test."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def picture(number: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A random RGB picture that depends on its number; size is (width, height)."""
    rng = torch.Generator().manual_seed(number)
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), generator=rng, dtype=torch.uint8).numpy())


def encoded(number: int, kind: str = "png", size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    picture(number, size).save(buffer, format=kind)
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"a photo of the digits {WORDS[number // 10 % 10]} {WORDS[number % 10]}"


def write_csv(folder: Path, n: int = 6, kind: str = "png") -> Path:
    """``n`` pictures, a caption each and a second one for picture 0; CRLF; another column."""
    (folder / "pictures").mkdir(parents=True)
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(["id", "images", "caption"])
        for i in range(n):
            (folder / "pictures" / f"{i}.{kind}").write_bytes(encoded(i, "jpeg" if kind == "jpg" else kind))
            writer.writerow([f"id {i}", f"pictures/{i}.{kind}", caption(i)])
        writer.writerow(["again", f"pictures/0.{kind}", caption(99)])
    return folder / "train.csv"


def write_folder(folder: Path, n: int = 6) -> Path:
    (folder / "deep").mkdir(parents=True)
    for i in range(n):
        place = folder / "deep" if i % 2 else folder
        (place / f"{i}.png").write_bytes(encoded(i))
        (place / f"{i}.txt").write_text(caption(i) + "\n" + (caption(99) + "\n" if i == 0 else ""))
    return folder


def write_imagefolder(folder: Path, n: int = 6) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i in range(n):
            (folder / f"{i}.png").write_bytes(encoded(i))
            file.write(json.dumps({"file_name": f"{i}.png", "text": caption(i), "boxes": [i, 2.5]}) + "\n")
    return folder


def write_shards(folder: Path, n: int = 6, shard: int = 3, kind: str = "png") -> Path:
    """As img2dataset writes them."""
    folder.mkdir(parents=True)
    for start in range(0, n, shard):
        with tarfile.open(folder / f"{start // shard:05d}.tar", "w") as archive:
            for i in range(start, min(start + shard, n)):
                about = {"caption": caption(i), "url": f"https://example.org/{i}", "width": 16, "sha256": "old"}
                members = {
                    kind: encoded(i, "jpeg" if kind == "jpg" else kind),
                    "txt": caption(i).encode(),
                    "json": json.dumps(about).encode(),
                }
                for extension, data in members.items():
                    add_member(archive, f"{i:09d}.{extension}", data)
    return folder


WRITERS = {"csv": write_csv, "folder": write_folder, "imagefolder": write_imagefolder, "webdataset": write_shards}


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def read_export(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """The images uint8 ``[N, C, H, W]`` and captions of an exported folder."""
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    arrays = [np.array(Image.open(folder / row["images"])) for row in rows]
    images = torch.stack([torch.from_numpy(a[..., None] if a.ndim == 2 else a).permute(2, 0, 1) for a in arrays])
    return images, [row["caption"] for row in rows]
