"""All checks of a published dataset, one after the other; every picture is decoded once, one for each thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.data.captions import DiskSource, Listing, list_pairs
from ccu_fast.data.pictures import BadPicture
from ccu_fast.mem.verification.check import Check, as_text, checked, counted, skipped
from ccu_fast.mem.verification.libraries import check_library, library_of
from ccu_fast.mem.verification.manifest import check_files, check_hashes, read_manifest
from ccu_fast.mem.verification.originals import (
    Distance,
    Pairs,
    change_of_form,
    check_noise,
    distance,
    largest_change,
    original_pixels,
    originals,
    published_names,
    published_pixels,
    size_text,
)
from ccu_fast.mem.verification.shown import Shown, choose, show
from ccu_fast.runs.progress import Progress, silent

_CHUNK = 64


def verify(
    folder: str | Path,
    original: str | Path | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check a dataset that ``ccu-fast protect`` has written, before it is published.

    - ``manifest``: manifest.json is there and of this package
    - ``files``: every file that it names is there, and no other
    - ``hashes``: each has the SHA-256 that it names
    - ``pictures``: as many as it says can be decoded
    - ``captions``: as many as it says can be read
    - ``pairs``: each picture of the original is published, with as many captions, or was left out by ``skip_bad``
    - ``noise``: no pixel differs from the original's by more than ε
    - ``triggers``: captions are trigger words and the original caption
    - ``datasets`` or ``webdataset``: that library reads all of it

    Three of them need the original. It is read by the format and the columns that the manifest names, and compared in
    the size of the published picture: pixel by pixel where that is its own size (upright, without transparency), else
    resized and cropped as it was for a thumbnail.

    Args:
        folder: of the published dataset.
        original: the dataset that was protected; see :func:`ccu_fast.data.captions.list_pairs`.
        threads: decoders; by default the processors this process may use. One picture for each is in memory.
        progress: called as ``progress(stage, done, total, note)``.

    Returns:
        A dict that ``json.dumps`` takes: ``passed`` (no check failed) and ``checks[name]``: ``passed`` (None where it
        was not done), ``told`` (what there is, with its figure, or why it was not done), ``problems`` (the first ten,
        as sentences) and ``count`` (how many there are).

    Raises:
        FileNotFoundError: no such folder or original.
        ImportError: a package that the format needs is missing.
        ValueError: the original cannot be read; naming the argument.

    >>> import tempfile
    >>> found = ccu_fast.mem.verify(tempfile.mkdtemp())
    >>> found["passed"], found["checks"]["manifest"]["count"]
    (False, 1)
    """
    return verify_and_show(folder, original, threads=threads, progress=progress)[0]


def verify_and_show(
    folder: str | Path,
    original: str | Path | None = None,
    *,
    pairs: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[Shown]]:
    """What :func:`verify` returns, and ``pairs`` published pictures beside their originals, from the least similar on.

    Raises:
        ValueError: pairs without an original.
    """
    extras.require("PIL")
    folder = Path(folder)
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    check.integer("threads", threads, low=1)
    check.integer("pairs", pairs, low=0)
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"folder: expected the folder of a published dataset, got {folder}, which {why}")
    if pairs and original is None:
        raise ValueError("original: expected the dataset that was protected, to show pairs of, got none")
    if original is not None and not Path(original).exists():
        raise FileNotFoundError(f"original: expected a file or folder, got {original}, which does not exist")
    found = _Verification(folder, threads, progress)
    shown = found.go(None if original is None else Path(original), pairs)
    checks = found.checks
    return {
        "folder": as_text(str(folder)),
        "original": None if original is None else as_text(str(original)),
        "passed": all(each.passed is not False for each in checks.values()),
        "checks": {name: asdict(each) for name, each in checks.items()},
    }, shown


class _Verification:
    def __init__(self, folder: Path, threads: int, progress: Progress) -> None:
        self.folder, self.threads, self.progress = folder, threads, progress
        self.checks: dict[str, Check] = {}

    def go(self, original: Path | None, pairs: int) -> list[Shown]:
        checks, folder = self.checks, self.folder
        self.progress("reading the dataset", 0, 1, "")
        manifest, checks["manifest"] = read_manifest(folder)
        if not manifest:
            return []
        clean = None if original is None else originals(original, manifest)
        checks["files"] = check_files(folder, manifest)
        checks["hashes"] = check_hashes(folder, manifest, self.threads, self._stage("hashing files"))
        try:
            listing = list_pairs(folder, name="folder")
        except (OSError, ValueError) as error:
            checks["captions"] = checked("unreadable", [str(error).removeprefix("folder: ")])
            return []
        with ExitStack() as stack:
            self.max_pixels = manifest["max_pixels"]
            self.source = stack.enter_context(closing(self._opened(listing)))
            paired = None if clean is None else Pairs(listing, clean, manifest)
            self.clean = None if clean is None else stack.enter_context(closing(self._opened(clean)))
            distances = self._look(listing, manifest, paired, similar=pairs > 0)
            checks["captions"] = checked(counted(len(listing.captions), "caption"), _captions(listing, manifest))
            triggers = manifest["method"]["triggers"]
            if paired is None:
                checks |= dict.fromkeys(("pairs", "noise", "triggers"), skipped("no original to compare with"))
            else:
                checks["pairs"] = paired.check()
                checks["noise"] = checks.pop("noise")  # in the order of the table
                # The authors' triggers need not be words.
                compat = triggers and manifest["settings"].get("compat")
                among = bool(triggers) and manifest["settings"].get("place") == "among"
                checks["triggers"] = paired.check_triggers(None if compat else triggers, among=among)
            library = library_of(manifest["format"])
            if manifest["format"] != "folder":  # which no library reads
                self.progress(f"reading with {library}", 0, 1, "")
            checks[library] = check_library(folder, manifest, listing)
            if paired is None:
                return []
            return [
                show(paired, number, distances[number], place, *self._both(number, paired.partner[number]))
                for number, place in choose(distances, pairs)
            ]

    def _opened(self, listing: Listing) -> DiskSource:
        return DiskSource(listing, (3, 1, 1), threads=self.threads)  # its own sizes are not asked for

    def _both(self, number: int, partner: int | None) -> tuple[Tensor, Tensor]:
        """The original, in the size of what was published, and that."""
        assert self.clean is not None and partner is not None
        published = published_pixels(self.source.read(number), self.max_pixels)
        return original_pixels(self.clean.read(partner), published, self.max_pixels), published

    def _look(
        self, listing: Listing, manifest: dict[str, Any], paired: Pairs | None, *, similar: bool
    ) -> dict[int, Distance]:
        """Decode every picture, and its original if there is one."""
        names = published_names(listing)
        bad: dict[int, str] = {}
        sizes: set[tuple[int, ...]] = set()
        distances: dict[int, Distance] = {}
        unread: dict[int, str] = {}
        changed: dict[int, str] = {}
        thumbnails = manifest["thumbnails"]

        def look(number: int) -> None:
            try:
                published = published_pixels(self.source.read(number), self.max_pixels)
            except (OSError, BadPicture) as error:
                bad[number] = _why(error)
                return
            sizes.add((published.shape[2], published.shape[1]))
            if thumbnails is not None and list(published.shape[1:]) != thumbnails:
                changed[number] = f"expected {size_text(thumbnails)}, got {size_text(published.shape[1:])}"
            partner = None if paired is None else paired.partner[number]
            if partner is None or self.clean is None:
                return
            try:
                data = self.clean.read(partner)
                original = original_pixels(data, published, self.max_pixels)
                why = None if thumbnails else change_of_form(data, self.source.read(number), self.max_pixels)
                if why is not None:
                    changed[number] = why
            except (OSError, BadPicture) as error:
                unread[number] = f"{names[number]}: its original cannot be read: {_why(error)}"
                return
            distances[number] = distance(original, published, similar=similar)

        stage = self._stage("reading pictures")
        for start in range(0, listing.n_images, _CHUNK):
            end = min(start + _CHUNK, listing.n_images)
            self.source.each(lambda place, start=start: look(start + place), end - start)  # type: ignore[misc]
            stage(end, listing.n_images)

        def problems() -> Iterator[str]:
            if listing.n_images != manifest["images"]:
                yield f"expected {counted(manifest['images'], 'picture')}, as the manifest says, got {listing.n_images}"
            for number, why in sorted((bad | changed).items()):
                yield f"{names[number]}: {why}"

        of = f" of {'x'.join(map(str, *sizes))}" if len(sizes) == 1 else f", {len(sizes)} sizes" if sizes else ""
        self.checks["pictures"] = checked(counted(listing.n_images - len(bad), "picture") + of, problems())
        if paired is not None:
            said = [why for _, why in sorted(unread.items())]
            self.checks["noise"] = check_noise(names, distances, largest_change(manifest), said)
        return distances

    def _stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total, "")


def _captions(listing: Listing, manifest: dict[str, Any]) -> Iterator[str]:
    if len(listing.captions) != manifest["rows"]:
        yield f"expected {counted(manifest['rows'], 'caption')}, as the manifest says, got {len(listing.captions):,}"
    for bad in listing.bad:
        yield str(bad)


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "not there"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
