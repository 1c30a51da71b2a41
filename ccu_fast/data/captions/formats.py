"""The layouts of image-caption datasets: which one a path has, and what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ccu_fast.data.captions.folders import list_folder
from ccu_fast.data.captions.listing import FORMATS, MANIFEST, Listing, Options
from ccu_fast.data.captions.shards import list_shards
from ccu_fast.data.captions.tables import list_table
from ccu_fast.files import read_json


def list_pairs(path: str | Path, options: Options | None = None, name: str = "input") -> Listing:
    """Read what a dataset holds; no picture is opened.

    ==============  ==================================================================================================
    ``csv``         a ``.csv`` or ``.tsv`` file, or a folder with one; image paths are absolute or relative to it
    ``imagefolder`` a folder with ``metadata.csv`` or ``metadata.jsonl`` (Hugging Face)
    ``webdataset``  a ``.tar`` file or a folder of them; each key has one image and one ``txt`` (img2dataset)
    ``folder``      any other folder: pictures, and beside each ``x.jpg`` an ``x.txt`` with one caption a line
    ==============  ==================================================================================================

    The format is recognised (files by their ending, folders as imagefolder, webdataset, csv, folder in this order)
    unless ``options`` names it. What this package published is read by the format that its manifest names.

    Args:
        path: of the dataset.
        options: how to read it.
        name: the argument that ``path`` came as, for errors.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: wrong columns, no pairs, an unknown layout.
    """
    path, options = Path(path), options or Options()
    if not path.exists():
        raise FileNotFoundError(f"{name}: expected a file or folder, got {path}, which does not exist")
    format = options.format or recognise(path, name)
    if format not in ("csv", "imagefolder") and (options.image_column or options.caption_column):
        raise ValueError(f"image_column, caption_column: expected with csv or imagefolder only, got format {format}")
    try:
        if format in ("csv", "imagefolder"):
            table = _table_in(path, format) if path.is_dir() else path
            listing = list_table(table, format, options.image_column, options.caption_column)
        else:
            listing = list_shards(path) if format == "webdataset" else list_folder(path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not listing.captions and not listing.bad:
        raise ValueError(f"{name}: expected image-caption pairs, got none in {path} (read as {format})")
    return replace(listing, argument=name)


def recognise(path: Path, name: str) -> str:
    """The format of what is there; see :func:`list_pairs`."""
    if path.is_file():
        kinds = {".csv": "csv", ".tsv": "csv", ".tar": "webdataset"}
        if path.suffix.lower() not in kinds:
            raise ValueError(f"{name}: expected .csv, .tsv, .tar or a folder, got {path}")
        return kinds[path.suffix.lower()]
    if (path / MANIFEST).is_file():
        known = read_json(path / MANIFEST, name).get("format")
        if known in FORMATS:
            return str(known)
    if any((path / f"metadata.{kind}").is_file() for kind in ("csv", "jsonl")):
        return "imagefolder"
    if any(path.glob("*.tar")):
        return "webdataset"
    return "csv" if len([*path.glob("*.csv"), *path.glob("*.tsv")]) == 1 else "folder"


def _table_in(folder: Path, format: str) -> Path:
    pattern = ("metadata.csv", "metadata.jsonl") if format == "imagefolder" else ("*.csv", "*.tsv")
    found = sorted(file for p in pattern for file in folder.glob(p))
    if len(found) != 1:
        raise ValueError(f"expected one of {pattern} in {folder}, got {[f.name for f in found] or 'none'}")
    return found[0]
