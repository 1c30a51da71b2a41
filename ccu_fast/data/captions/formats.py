"""The layouts of image-caption datasets: which one a path has, and what it holds."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ccu_fast.data.captions.folders import list_folder
from ccu_fast.data.captions.listing import FORMATS, MANIFEST, Listing, Options, is_hidden, visible_files
from ccu_fast.data.captions.shards import SHARDS, is_shard, list_shards
from ccu_fast.data.captions.tables import list_tables
from ccu_fast.data.pictures import is_picture

ENDINGS = dict.fromkeys((".csv", ".tsv", ".parquet"), "csv") | dict.fromkeys(SHARDS, "webdataset")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COLUMNS = {"image_column": ("csv", "imagefolder"), "caption_column": ("csv", "imagefolder", "webdataset")}


def list_pairs(path: str | Path, options: Options | None = None, name: str = "input") -> Listing:
    """Read what a dataset holds; no picture is opened.

    - ``csv``: a ``.csv``, ``.tsv`` or ``.parquet`` file, or a folder with one ``.csv`` or ``.tsv``; image paths are
      absolute or relative to it
    - ``imagefolder``: a folder with ``metadata.csv``, ``.jsonl`` or ``.parquet``, or one in each split (Hugging Face)
    - ``webdataset``: a ``.tar`` or ``.tar.gz`` file, or a folder with some in it or below; each key has one image and
      one ``txt``, or else a ``json`` with a caption (img2dataset)
    - ``folder``: any other folder: pictures, and beside each ``x.jpg`` an ``x.txt`` with one caption a line

    The format is recognised (files by their ending, folders as imagefolder, webdataset, csv, folder in this order)
    unless ``options`` names it. What this package published is read by the format and the columns that its manifest
    names. A caption in JSON may be a list of captions. Hidden files are passed over.

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
    folder, manifest = _published(path)
    own = manifest["format"] if folder == path.absolute() else None
    format = options.format or own or recognise(path, name)
    options = _as_published(manifest, format, options)
    wrong = [column for column, formats in COLUMNS.items() if getattr(options, column) and format not in formats]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected with {' or '.join(COLUMNS[wrong[0]])} only, got format {format}")
    try:
        if format in ("csv", "imagefolder"):
            tables = _tables_in(path, format) if path.is_dir() else [path]
            root = path if path.is_dir() else path.parent
            listing = list_tables(tables, root, format, options.image_column, options.caption_column)
        else:
            listing = list_shards(path, options.caption_column) if format == "webdataset" else list_folder(path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not listing.captions and not listing.bad:
        raise ValueError(f"{name}: expected image-caption pairs, got none in {path} (read as {format})")
    return replace(listing, argument=name)


def recognise(path: Path, name: str) -> str:
    """The format of what is there, without a manifest of this package; see :func:`list_pairs`."""
    if path.is_file():
        for ending, format in ENDINGS.items():
            if path.name.lower().endswith(ending):
                return format
        raise ValueError(f"{name}: expected {', '.join(ENDINGS)} or a folder, got {path}")
    here = _files_in(path)
    if set(METADATA) & set(here):
        return "imagefolder"
    if any(map(is_shard, here)):
        return "webdataset"
    if len(list(filter(_is_table, here))) == 1:
        return "csv"
    below = list(visible_files(path))
    if any(Path(file).name in METADATA for file in below):
        return "imagefolder"
    return "webdataset" if any(map(is_shard, below)) and not any(map(is_picture, below)) else "folder"


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of what this package published into a folder; None where there is none, or another program's."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("run"), str) or found.get("format") not in FORMATS:
        return None
    return found if isinstance(found.get("sha256"), dict) else None


def _published(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """The published folder that ``path`` is, or is a part of, and its manifest; (None, {}) if there is none."""
    whole = path.absolute()
    for folder in (whole, *whole.parents):
        if (manifest := _manifest(folder)) is not None:
            inside = str(whole.relative_to(folder))
            files = manifest["sha256"]
            if folder == whole or inside in files or any(name.startswith(f"{inside}/") for name in files):
                return folder, manifest
    return None, {}


def _as_published(manifest: dict[str, Any], format: str, options: Options) -> Options:
    """The options, with the columns of the manifest where none are given."""
    columns = manifest.get("columns")
    if manifest.get("format") != format or not isinstance(columns, list) or len(columns) != 2:
        return options
    image, caption = (column if isinstance(column, str) else None for column in columns)
    return replace(
        options,
        image_column=options.image_column or (None if format == "webdataset" else image),
        caption_column=options.caption_column or caption,
    )


def _files_in(folder: Path) -> list[str]:
    """The names of the files in a folder, hidden ones aside."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not is_hidden(entry.name))


def _is_table(file: str) -> bool:
    # Not .parquet: img2dataset writes one about its own doings beside its pictures.
    return file.lower().endswith((".csv", ".tsv"))


def _tables_in(folder: Path, format: str) -> list[Path]:
    if format == "csv":
        here = _files_in(folder)
        # What was published from a .parquet is one, and its manifest says csv.
        names = list(filter(_is_table, here)) or [file for file in here if file.lower().endswith(".parquet")]
        if len(names) != 1:
            raise ValueError(f"expected one .csv, .tsv or .parquet file in {folder}, got {names or 'none'}")
        return [folder / names[0]]
    found = [folder / file for file in visible_files(folder) if Path(file).name in METADATA]
    if not found:
        raise ValueError(f"expected one of {METADATA} in {folder} or below, got none")
    for one, other in pairwise(found):
        if one.parent == other.parent:
            raise ValueError(f"expected one of {METADATA} in {one.parent}, got {one.name} and {other.name}")
    return found
