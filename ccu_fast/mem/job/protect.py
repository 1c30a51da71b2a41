"""From a dataset on a disk to its protected copy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ccu_fast.data.captions import DiskSource, Listing, list_pairs
from ccu_fast.data.captions.listing import MANIFEST
from ccu_fast.distributed.ranks import barrier, gather_objects, processes
from ccu_fast.files import after_the_work, locked, new_folder, output_folder, read_json
from ccu_fast.mem.job.checkpoint import Workplace, remove_run, workplace
from ccu_fast.mem.job.generation import generate
from ccu_fast.mem.job.inspection import (
    SKIP,
    all_bad,
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
from ccu_fast.mem.job.share import WholeNumbers, average_surrogate, check_complete, share
from ccu_fast.mem.protection import Protection
from ccu_fast.mem.publish import Publisher, write_manifest, write_reference_files
from ccu_fast.mem.publish.card import CARD
from ccu_fast.mem.publish.writer import write_metadata
from ccu_fast.mem.source import Part
from ccu_fast.models.named import Model
from ccu_fast.runs.checkpoint import read_state, write_state
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.runs.provenance import json_hash, versions


def protect_dataset(job: Job, progress: Progress = silent) -> dict[str, Any]:
    """Protect a dataset; called again after an interruption it continues and ends with the same bits.

    So it does on a CPU, with the same versions and number of threads.

    Under ``torchrun`` each process protects its share of the images, with batches of its own; the surrogate is one, its
    gradients are averaged. That is one process's run up to the composition of batches: an image meets only images of
    its own share, and a surrogate step sees ``processes · batch`` pairs.

    Args:
        job: what to do.
        progress: called as ``progress(stage, done, total, note)``.

    Returns:
        The manifest.

    Raises:
        BadData: something in the input cannot be used, or not be published, and ``skip_bad`` is not set.
        FileExistsError: ``out`` has contents that are not this run's.
        ValueError: naming the argument.
        OSError: the disk. What was done stays in ``<out>.partial``.

    Source: Liu et al. 2024 (arXiv 2407.16307).

    >>> from pathlib import Path
    >>> from ccu_fast.mem.job import Job
    >>> from ccu_fast.mem import choose_model
    >>> job = Job(Path("train.csv"), Path("protected"), choose_model("small"))  # doctest: +SKIP
    >>> ccu_fast.mem.protect_dataset(job)["measured"]["eps_255"]  # doctest: +SKIP
    8
    """
    with processes(job.device) as (rank, world):
        return _Run(job, rank, world, progress).go()


class _Run:
    def __init__(self, job: Job, rank: int, world: int, progress: Progress) -> None:
        self.job, self.rank, self.world, self.progress = job, rank, world, progress
        self.notes: dict[str, int] = {}
        self.out = Path(os.path.realpath(job.out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        # Beside the dataset, not in it: they undo the protection.
        self.reference = self.out.with_name(self.out.name + ".reference")
        if world > 1 and job.method.noise == "universal":
            raise ValueError("method: expected one process for uap, whose noise all images share")
        if world > 1 and job.reference_files:
            raise ValueError("reference_files: expected one process, which has all rows in their order")

    def go(self) -> dict[str, Any]:
        job = self.job
        check_places(job)
        complete = (self.out / MANIFEST).is_file()
        if self.rank == 0 and not complete:
            new_folder(job.out)
            if job.reference_files:
                output_folder(self.reference, "reference_files")
        barrier()
        self.progress("reading the dataset", 0, 1, "")
        listing = list_pairs(job.input, job.options)
        check_listing(job, listing)
        fingerprint = listing.fingerprint()
        if len(set(gather_objects(fingerprint))) > 1:
            raise ValueError("input: expected the same files and rows for all processes, got others for some")
        self.progress("preparing the surrogate", 0, 1, "")
        model = job.model(listing.captions)
        run = self._describe(fingerprint, model)
        if complete:
            return self._finished(run)
        with workplace(self.partial, run, self.rank, fresh=job.fresh) as place:
            listing, mine, digests, sizes = self._look(place, listing, model)
            check_compat(job, listing)
            with closing(source_of(job, listing, model, digests)) as source:
                part = part_of(job, source, mine, sizes, model)
                if self.rank == 0:
                    room(job, source, mine, part, sizes, place.folder).check()
                barrier()
                protection = self._generate(place, part, model, source.captions)
                with after_the_work(f"all rounds are kept in {self.partial}, where the same command goes on"):
                    manifest = self._publish(place, source, part, protection, run)
            barrier()
            if self.rank == 0:
                place.finish(self.out)
        barrier()
        return manifest

    def _describe(self, fingerprint: str, model: Model) -> dict[str, Any]:
        job = self.job
        return {
            "method": asdict(job.method),
            "settings": asdict(job.settings),
            "seed": job.seed,
            "execution": {**asdict(job.execution), "autocast": str(job.execution.autocast)},
            "surrogate": model.about,
            "input": fingerprint,
            "thumbnails": list(model.image_shape[1:]) if job.thumbnails else None,
            "max_pixels": job.max_pixels,
            "reference_files": job.reference_files,
            "processes": self.world,
            "made_with": versions("ccu_fast", "torch", "pillow", "threads"),
        }

    def _finished(self, run: dict[str, Any]) -> dict[str, Any]:
        """The manifest, if this very run is complete."""
        manifest = read_json(self.out / MANIFEST)
        if not isinstance(manifest, dict) or "run" not in manifest:
            raise FileExistsError(f"out: expected a new or empty folder, got {self.job.out}")
        if manifest["run"] != json_hash(run):
            raise FileExistsError(
                f"out: expected a new or empty folder, got {self.job.out}, which holds a dataset of other settings, "
                "another input or another version; choose another folder, or remove this one to make the dataset anew"
            )
        if self.rank == 0 and self.partial.is_dir():  # killed between the last two steps
            with locked(self.partial / "lock-0"):
                remove_run(self.partial)
            with suppress(OSError):
                self.partial.rmdir()
        return manifest

    def _look(
        self, place: Workplace, listing: Listing, model: Model
    ) -> tuple[Listing, list[int], Tensor, Tensor | None]:
        """Every picture is read once before the work begins.

        Returns:
            The usable listing, this process's images, digests, and sizes of pictures that keep theirs.
        """
        try:
            mine = share(listing, self.rank, self.world)
        except ValueError:
            if not self.job.skip_bad:
                listing.whole(SKIP)  # which may be why
            raise
        path, unfinished = (place.folder / f"{name}-{self.rank}.pt" for name in ("scan", "scanning"))
        if path.exists():
            found = read_state(path, "out")
        else:
            found = inspect(
                self.job,
                listing,
                model,
                mine,
                place.folder,
                self.progress,
                files=self.rank == 0,
                kept=unfinished,
            )
        parts = gather_objects(found)
        bad = {number: why for part in parts for number, why in part["bad"].items()}
        if (bad or listing.bad) and not self.job.skip_bad:
            # Nothing is kept: they, and others, may be mended before the next try.
            unfinished.unlink(missing_ok=True)
            raise all_bad(listing, bad)
        if not path.exists():
            write_state(path, found)
            unfinished.unlink(missing_ok=True)
        digests = torch.cat([part["digests"] for part in parts])
        self.notes = dict(sum((Counter(part["notes"]) for part in parts), Counter[str]()))
        left, keep = usable(listing, bad)
        kept = [new for new, number in enumerate(keep) if mine[0] <= number <= mine[-1]]
        counts = gather_objects(len(kept))
        if min(counts) < 2:
            each = " for each process" if len(counts) > 1 else ""
            raise ValueError(f"input: expected at least two usable images{each}, got {', '.join(map(str, counts))}")
        sizes = None if self.job.thumbnails else torch.cat([part["sizes"] for part in parts])[keep]
        return left, kept, digests[keep], sizes

    def _generate(self, place: Workplace, part: Part, model: Model, captions: Sequence[str]) -> Protection:
        job = self.job
        rows = 1 if job.method.noise == "universal" else part.n_images
        store = place.store(rows, part.noise_shape, job.device, on_disk=job.noise_on_disk)

        def average(parameters: Iterable[nn.Parameter]) -> None:
            average_surrogate(parameters, cast(nn.Module, protection.worker.surrogate).buffers())

        protection = Protection(
            part,
            model.tokenizer,
            model.factory,
            method=job.method,
            settings=job.settings,
            seed=job.seed,
            noise_store=store,
            device=job.device,
            execution=job.execution,
            shard=self.rank,
            average=average if self.world > 1 else None,
            gather=gather_objects if self.world > 1 else None,
            captions=captions if self.world > 1 else None,
            resumed=place.done > 0,
            progress=self.progress,
        )
        generate(protection, place, self.progress)
        return protection

    def _publish(
        self, place: Workplace, source: DiskSource, part: Part, protection: Protection, run: dict[str, Any]
    ) -> dict[str, Any]:
        made = WholeNumbers(protection, part)
        options: dict[str, Any] = {}
        if not self.job.thumbnails:
            options = {"whole": partial(made.published_picture, source), "together": source.threads}
        images = part.whole_images.tolist()
        publisher = Publisher(source, made, place.publish, place.folder, images, self.rank, **options)
        publisher.write(lambda done, total: self.progress("writing pictures", done, total, ""))
        self.progress("writing captions and the manifest", 0, 1, "")
        captions = dict(zip(part.rows.tolist(), made.published_captions(part.rows), strict=True))
        elsewhere = publisher.elsewhere
        parts = gather_objects(
            (publisher.hashes, asdict(publisher.fidelity), publisher.dropped, elsewhere.counts(), captions)
        )
        if self.rank == 0:
            hashes, dropped = publisher.hashes, Counter(publisher.dropped)
            for theirs, sums, left, counts, texts in parts[1:]:
                hashes |= theirs
                captions |= texts
                publisher.fidelity.merge(sums)
                dropped.update(left)
                elsewhere.merge(counts)
            hashes |= write_metadata(source.listing, captions.__getitem__, place.publish, elsewhere)
            if self.job.reference_files:
                self.reference.mkdir(parents=True, exist_ok=True)
                write_reference_files(source, made, protection.triggers, self.reference)
            write_manifest(
                place.publish,
                source.listing,
                run={**run, "run": place.key},
                fidelity=publisher.fidelity,
                losses=protection.losses,
                hashes=hashes,
                dropped=dropped,
                elsewhere=elsewhere,
                skipped=source.listing.bad,
                notes=self.notes,
            )
            check_complete(place.publish, {MANIFEST, CARD, *hashes})
        barrier()
        return dict(read_json(place.publish / MANIFEST))
