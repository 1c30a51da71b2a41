"""Whether the libraries that people train with read a published dataset."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ccu_fast.data.captions import Listing
from ccu_fast.mem.verification.check import Check, checked, counted, skipped


def library_of(format: str) -> str:
    """The library that a dataset of a format is read by."""
    return "webdataset" if format == "webdataset" else "datasets"


def check_library(folder: Path, manifest: dict[str, Any], listing: Listing) -> Check:
    """Whether its library reads every picture or record; skipped where it is not installed or has no such reader."""
    if manifest["format"] == "folder":
        return skipped("the library has no reader for pictures with .txt files beside them")
    name = library_of(manifest["format"])
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        return skipped(f"{name} is not installed ({error})")
    if name == "webdataset":
        return _check_webdataset(library, folder, manifest)
    return _check_datasets(library, folder, manifest, listing)


def _check_webdataset(library: Any, folder: Path, manifest: dict[str, Any]) -> Check:
    shards = [str((folder / name).absolute()) for name in manifest["sha256"] if name.endswith(".tar")]
    samples = pictures = 0
    try:
        for sample in library.WebDataset(shards, shardshuffle=False):
            samples += 1
            # Of a.1.png and a.2.png it makes one sample.
            pictures += sum(field.rpartition(".")[2] == "png" for field in sample)
    except Exception as error:  # whatever it raises
        return checked("stopped", [f"webdataset stops after {counted(samples, 'sample')}: {_why(error)}"])
    told = f"{counted(samples, 'sample')}, {counted(pictures, 'picture')}"
    wrong = pictures != manifest["images"]
    return checked(told, [f"expected {counted(manifest['images'], 'picture')}, got {pictures:,}"] if wrong else [])


def _check_datasets(library: Any, folder: Path, manifest: dict[str, Any], listing: Listing) -> Check:
    expected, rows = len(set(listing.records)), 0
    if manifest["format"] == "imagefolder" and (manifest.get("columns") or [""])[0] != "file_name":
        return skipped("the library links pictures by a column file_name, which the original has not")
    try:
        with _quiet(library), tempfile.TemporaryDirectory() as cache:
            for split in _splits(library, folder, manifest, listing, cache):
                rows += sum(1 for _ in split)
    except Exception as error:  # whatever it raises
        return checked("stopped", [f"datasets stops after {counted(rows, 'record')}: {_why(error)}"])
    wrong = rows != expected
    problems = [f"expected {counted(expected, 'record')}, got {rows:,}"] if wrong else []
    return checked(counted(rows, "record"), problems)


def _splits(library: Any, folder: Path, manifest: dict[str, Any], listing: Listing, cache: str) -> Iterator[Any]:
    # Streaming: nothing is copied, and pictures are decoded one by one.
    options: dict[str, Any] = {"streaming": True, "cache_dir": cache}
    if manifest["format"] == "imagefolder":
        yield from library.load_dataset("imagefolder", data_dir=str(folder.absolute()), **options).values()
        return
    for table in listing.tables:
        kind = "parquet" if table.suffix.lower() == ".parquet" else "csv"
        if table.suffix.lower() == ".tsv":
            options["sep"] = "\t"
        yield from library.load_dataset(kind, data_files=[str(table.absolute())], **options).values()


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without bars of its own."""
    shown = not library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bars()


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
