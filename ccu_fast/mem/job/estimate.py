"""What a run will take: its input is looked at as the run would, and a few batches of each phase are timed."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ccu_fast.data.captions import DiskSource, list_pairs
from ccu_fast.data.captions.dataset import bad_pictures
from ccu_fast.data.pictures import encode_png
from ccu_fast.files import new_folder
from ccu_fast.mem.fidelity import Fidelity
from ccu_fast.mem.job.inspection import (
    check_compat,
    check_listing,
    check_places,
    inspect,
    part_of,
    room,
    source_of,
    usable,
)
from ccu_fast.mem.job.job import Job
from ccu_fast.mem.job.share import WholeNumbers
from ccu_fast.mem.protection import Protection
from ccu_fast.mem.source import Part
from ccu_fast.runs.progress import Progress, silent

TIMED = 3  # batches of each phase
WRITTEN = 16  # pictures
_PUBLISHING = 17  # bytes for each pixel of a picture while it is published, measured on 24 megapixels


def estimate(job: Job, progress: Progress = silent) -> dict[str, Any]:
    """Check everything that can be checked before a run, and say what the run will take. It leaves nothing on the disk.

    Args:
        job: what is to be done, by one process; an unfinished run with the same output is left as it is.
        progress: called as ``progress(stage, done, total, note)``.

    Returns:
        A dict that ``json.dumps`` takes: ``images`` and ``rows`` that can be used; ``bad``, all items that cannot, each
        with ``where`` and ``why``; ``ready``, whether the run would begin: there are no bad items, or ``skip_bad`` is
        set, and there is room. Where fewer than two images can be used, there is nothing else. ``pictures``:
        ``smallest``, ``median`` and ``largest`` by area, [height, width] as published. ``disk_bytes`` with ``needed``
        and ``free``, ``memory_bytes`` and, on a GPU, ``device_memory_bytes``: the peak, about. ``phases``: for each its
        ``batches`` in the whole run and ``seconds`` of one. ``seconds``: of ``checking`` (as long as here),
        ``preparing``, ``generating``, ``writing``, and their ``total``.

    Raises:
        FileExistsError: ``out`` has contents.
        FloatingPointError: the surrogate's loss is not finite.
        ValueError: naming the argument.
        OSError: the disk.

    >>> from pathlib import Path
    >>> from ccu_fast.mem.job import Job, estimate
    >>> from ccu_fast.mem import choose_model
    >>> job = Job(Path("train.csv"), Path("protected"), choose_model("small"))  # doctest: +SKIP
    >>> estimate(job)["seconds"]["total"]  # doctest: +SKIP
    5400.0
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"dry_run: expected one process, got {processes}")
    check_places(job)
    with _trial(job.out) as folder:
        return _look(job, folder, progress)


@contextmanager
def _trial(out: Path) -> Iterator[Path]:
    """A folder beside the output, which goes away again, as do the folders that it lies in if they are new."""
    place = Path(os.path.realpath(out))
    new = [folder for folder in place.parents if not folder.exists()]
    try:
        new_folder(out)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as trial:
            yield Path(trial)
    finally:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()


def _look(job: Job, folder: Path, progress: Progress) -> dict[str, Any]:
    progress("reading the dataset", 0, 1, "")
    listing = list_pairs(job.input, job.options)
    # What is bad is told together, whatever the run would do about it.
    check_listing(replace(job, skip_bad=True), listing)
    model = job.model(listing.captions)
    start = time.perf_counter()
    found: dict[str, Any] = {"bad": {}}
    if listing.n_images:
        found = inspect(job, listing, model, range(listing.n_images), folder, progress, files=True)
    checking = time.perf_counter() - start
    bad = [*listing.bad, *bad_pictures(listing, found["bad"])]
    left, keep = usable(listing, found["bad"])
    told: dict[str, Any] = {
        "images": left.n_images,
        "rows": len(left.captions),
        "bad": [{"where": item.where, "why": item.why} for item in bad],
        "ready": False,
    }
    if left.n_images < 2:
        if not bad:
            raise ValueError(f"input: expected at least two usable images, got {left.n_images}")
        return told
    check_compat(job, left)
    sizes = None if job.thumbnails else found["sizes"][keep]
    with closing(source_of(job, left, model, found["digests"][keep])) as source:
        images = list(range(left.n_images))
        part = part_of(job, source, images, sizes, model)
        space = room(job, source, images, part, sizes, folder)
        start = time.perf_counter()
        protection = Protection(
            part,
            model.tokenizer,
            model.factory,
            method=job.method,
            settings=job.settings,
            seed=job.seed,
            device=job.device,
            execution=job.execution,
            progress=progress,
        )
        preparing = time.perf_counter() - start
        phases, state = _phases(protection, progress)
        writing = _writing(job, source, part, protection, progress) * left.n_images
    generating = sum(phase["batches"] * phase["seconds"] for phase in phases.values())
    needed = space.needed + 2 * state  # the checkpoint, and the one that takes its place
    seconds = {"checking": checking, "preparing": preparing, "generating": generating, "writing": writing}
    shown = torch.tensor([model.image_shape[1:]]).expand(left.n_images, 2) if sizes is None else sizes[:, :2]
    order = shown.prod(1).argsort(stable=True)
    return {
        **told,
        "ready": (job.skip_bad or not bad) and needed <= space.free,
        "pictures": {
            name: shown[order[place]].tolist()
            for name, place in (("smallest", 0), ("median", len(order) // 2), ("largest", -1))
        },
        "disk_bytes": {"needed": needed, "free": space.free},
        **_memory(job, protection, source, sizes),
        "phases": phases,
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def _phases(protection: Protection, progress: Progress) -> tuple[dict[str, Any], int]:
    """The batches of each phase in the whole run, with seconds of one; and bytes of the state in a checkpoint."""
    counts: dict[Any, int] = {}
    for index in range(protection.rounds):
        for phase, batches in protection.phases(index).items():
            counts[phase] = counts.get(phase, 0) + batches
    worker = protection.worker
    found: dict[str, Any] = {}
    if counts:
        worker.renew("surrogate 0")
    for number, (phase, batches) in enumerate(counts.items()):
        progress("timing batches", number, len(counts), phase)
        times: list[float] = []
        if batches:
            place = worker.begin(phase, min(batches, TIMED))
            place.plan, place.draws = place.plan[:TIMED], place.draws[:TIMED]
            steps, more = worker.through(place), True
            while more:
                start = time.perf_counter()
                more = next(steps, False) is None  # which it yields after each batch but the last
                if protection.device.type == "cuda":
                    torch.cuda.synchronize(protection.device)
                times.append(time.perf_counter() - start)
        # The first pays for what is made once.
        found[phase] = {"batches": batches, "seconds": median(times[1:] or times or [0.0])}
    if counts:
        progress("timing batches", len(counts), len(counts), "")
    return found, _bytes(worker.state())


def _bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(_bytes, values))


def _writing(job: Job, source: DiskSource, part: Part, protection: Protection, progress: Progress) -> float:
    """Seconds that a picture takes to be made and encoded, all threads at work."""
    made, n = WholeNumbers(protection, part), source.n_images
    some = torch.linspace(0, n - 1, min(WRITTEN, n)).long()
    progress("timing pictures", 0, 1, "")
    start = time.perf_counter()
    if job.thumbnails:
        published = made.published_images(some)
        Fidelity().add(source.images(some), published)

    def make(place: int) -> None:
        if job.thumbnails:
            encode_png(published[place])
        else:
            made.published_picture(source, int(some[place]))

    source.each(make, len(some))
    progress("timing pictures", 1, 1, "")
    return (time.perf_counter() - start) / len(some)


def _peak() -> int:
    """Bytes that were resident at most in this process."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells begins with the peak of the process that started this one
        found = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in found:
            return 1024 * int(found["VmHWM"].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _memory(job: Job, protection: Protection, source: DiskSource, sizes: Tensor | None) -> dict[str, int]:
    """The peak here, in which the noise is still empty, and what the run has beyond that."""
    peak = _peak()
    on_gpu = protection.device.type == "cuda"
    if not job.noise_on_disk and not on_gpu:
        peak += protection.store.rows * prod(protection.store.item_shape)
    if sizes is not None:
        peak += source.threads * _PUBLISHING * int(sizes[:, :2].prod(1).max())
    found = {"memory_bytes": peak}
    if on_gpu:
        found["device_memory_bytes"] = torch.cuda.max_memory_allocated(protection.device)
    return found
