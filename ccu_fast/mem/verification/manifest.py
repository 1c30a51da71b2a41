"""The manifest of a published dataset, and whether its files are those that it names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ccu_fast.data.captions.listing import FORMATS, MANIFEST
from ccu_fast.mem.publish.card import CARD
from ccu_fast.mem.verification.check import Check, as_text, checked, counted
from ccu_fast.runs.provenance import file_hash

# What a manifest of ``ccu-fast protect`` has.
_KINDS: dict[str, type] = {
    "run": str,
    "rows": int,
    "images": int,
    "max_pixels": int,
    "method": dict,
    "settings": dict,
    "versions": dict,
    "skipped": dict,
    "sha256": dict,
}


def read_manifest(folder: Path) -> tuple[dict[str, Any], Check]:
    """What the manifest holds, and whether it is one; {} if it is not."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return {}, checked("none", [f"expected {MANIFEST} in {folder}, got none"])
    except (OSError, ValueError, RecursionError) as error:
        return {}, checked("unreadable", [f"expected {MANIFEST} to be JSON, got {error}"])
    if isinstance(found, dict):
        _complete(found)
    wrong = _wrong_fields(found) if isinstance(found, dict) else ["no object"]
    if wrong:
        told = f"expected {MANIFEST} as ccu-fast protect writes it, got other things as {', '.join(wrong)}"
        return {}, checked("of another program", [told])
    told = f"{found['format']}, {found['method'].get('name')}, eps {found['settings']['eps']}/255"
    return found, checked(as_text(f"{told}, made by ccu_fast {found['versions'].get('ccu_fast')}"), [])


def _complete(found: dict[str, Any]) -> None:
    """Version 0.1.0 published thumbnails alone, of the size that its surrogate took, and did not say so."""
    versions, surrogate = found.get("versions"), found.get("surrogate")
    if isinstance(versions, dict) and versions.get("ccu_fast") == "0.1.0" and isinstance(surrogate, dict):
        shape = surrogate.get("image_shape")
        if isinstance(shape, list):
            found.setdefault("thumbnails", shape[1:])


def _wrong_fields(found: dict[str, Any]) -> list[str]:
    wrong = [name for name, kind in _KINDS.items() if not isinstance(found.get(name), kind)]
    if found.get("format") not in FORMATS:
        wrong.append("format")
    if not _are_two_texts(found.get("columns")):
        wrong.append("columns")
    if wrong:
        return wrong
    if "thumbnails" not in found or not _is_size(found["thumbnails"]):
        wrong.append("thumbnails")
    if not all(isinstance(digest, str) for digest in found["sha256"].values()):
        wrong.append("sha256")
    if not _is_count(found["settings"].get("eps")):
        wrong.append("settings")
    if not _is_count(found["method"].get("triggers")):
        wrong.append("method")
    items = found["skipped"].get("items")
    if not isinstance(items, list) or not all(
        isinstance(item, dict) and all(isinstance(value, str) for value in item.values()) for item in items
    ):
        wrong.append("skipped")
    return wrong


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_size(value: Any) -> bool:
    """Height and width, or none: pictures have their own."""
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)))


def _are_two_texts(columns: Any) -> bool:
    """Or none, as of a folder."""
    if columns is None:
        return True
    return isinstance(columns, list) and len(columns) == 2 and all(isinstance(name, str) for name in columns)


def check_files(folder: Path, manifest: dict[str, Any]) -> Check:
    """Whether the files are exactly those of the manifest; the card's owner may have changed or removed it."""
    there, named = set(_files(folder)) - {MANIFEST, CARD}, set(manifest["sha256"])
    outside = {name for name in named if os.path.isabs(name) or os.path.normpath(name).startswith("..")}

    def problems() -> Iterator[str]:
        for name in sorted(outside):
            yield f"{name}: leads out of the folder"
        for name in sorted(named - there - outside):
            yield f"{name}: not there"
        for name in sorted(there - named):
            yield f"{name}: not in the manifest; it would be published unprotected"

    return checked(counted(len(there & named), "file"), problems())


def check_hashes(folder: Path, manifest: dict[str, Any], threads: int, progress: Callable[[int, int], None]) -> Check:
    """Whether the files that are there hold what they held when they were written."""
    there = set(_files(folder))
    names = [name for name in manifest["sha256"] if name in there]

    def wrong(name: str) -> str:
        try:
            same = file_hash(folder / name) == manifest["sha256"][name]
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        return "" if same else f"{name}: another SHA-256 than the manifest's, it has changed"

    def problems() -> Iterator[str]:
        with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
            for done, said in enumerate(pool.map(wrong, names)):
                progress(done + 1, len(names))
                if said:
                    yield said

    return checked(f"SHA-256 of {counted(len(names), 'file')}", problems())


def _files(folder: Path) -> Iterator[str]:
    """All that is no folder, hidden or not, relative to the dataset's."""
    for place, subfolders, files in os.walk(folder):
        links = [name for name in subfolders if os.path.islink(os.path.join(place, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(place, name), folder)
