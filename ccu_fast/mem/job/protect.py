"""From a dataset on a disk to its protected copy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ccu_fast import check, extras
from ccu_fast.data.captions import BadData, DiskSource, Listing, Options, list_pairs, scan
from ccu_fast.data.captions.dataset import bad_pictures
from ccu_fast.data.captions.listing import MANIFEST
from ccu_fast.data.pictures import MAX_PIXELS
from ccu_fast.distributed.ranks import barrier, gather_objects, processes
from ccu_fast.files import after_the_work, locked, new_folder, output_folder, read_json
from ccu_fast.mem.config import Execution, Method, Settings
from ccu_fast.mem.job.checkpoint import Workplace, remove_run, workplace
from ccu_fast.mem.job.share import WholeNumbers, average_surrogate, check_complete, share
from ccu_fast.mem.protection import Protection
from ccu_fast.mem.publish import Publisher, write_manifest, write_reference_files
from ccu_fast.mem.publish.rehearse import check_space, unreadable_captions, unwritable_files, unwritable_samples
from ccu_fast.mem.publish.writer import write_metadata
from ccu_fast.mem.source import Part
from ccu_fast.mem.views import Pictures
from ccu_fast.models.named import Model
from ccu_fast.runs.checkpoint import read_state, write_state
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.runs.provenance import json_hash, versions

SKIP = "skip_bad leaves them out"


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        input: see :func:`ccu_fast.data.captions.list_pairs`.
        out: a folder that does not exist or is empty, or a link to such a one. Until the run is complete its files are
            in ``<out>.partial``, beside the folder itself.
        model: all captions of the listing → the surrogate; called once.
        method, settings, seed: of the generator.
        options: how to read the input.
        thumbnails: pictures are resized to what the model takes, cut and published so; by default they keep their size.
        skip_bad: leave out what cannot be used, and list it in the manifest; otherwise it is an error.
        fresh: throw an unfinished run away first, unless it is going on.
        noise_on_disk: keep the noise in a mapped file instead of in memory.
        reference_files: also write ``noise.pt`` and ``token.pt`` into ``<out>.reference``; see
            :func:`write_reference_files`.
        threads: decoders.
        max_pixels: larger pictures are bad.
        device: of the surrogate.
        execution: autocast, memory order, compilation. A run goes on with the same.
    """

    input: Path
    out: Path
    model: Callable[[Sequence[str]], Model]
    method: Method = field(default_factory=lambda: Method.parse("mem"))
    settings: Settings = field(default_factory=Settings)
    seed: int = check.field(0, "Of everything random.", low=0)
    options: Options = field(default_factory=Options)
    thumbnails: bool = False
    skip_bad: bool = check.field(False, "Leave out and list what cannot be used, instead of stopping.")
    fresh: bool = check.field(False, "Throw an unfinished run with this output away.")
    noise_on_disk: bool = check.field(False, "Noise in a file, not in memory.")
    reference_files: bool = check.field(False, "Also noise.pt and token.pt of the authors' code.")
    threads: int | None = check.field(None, "Decoders; one for each processor if not given.", low=1)
    max_pixels: int = check.field(MAX_PIXELS, "Larger pictures are bad.", low=1)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        check.fields(self)
        for name, asked in (("compat", self.settings.compat), ("reference_files", self.reference_files)):
            if asked and not self.thumbnails:
                raise ValueError(
                    f"{name}: expected with thumbnails (--size HEIGHTxWIDTH) alone, because the authors' noise has one "
                    "size for all pictures; got pictures that keep their own"
                )


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
    >>> from ccu_fast.mem.job.models import choose
    >>> job = Job(Path("train.csv"), Path("protected"), choose("small"))  # doctest: +SKIP
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
        complete = (self.out / MANIFEST).is_file()
        if self.rank == 0 and not complete:
            new_folder(job.out)
            if job.reference_files:
                output_folder(self.reference, "reference_files")
        barrier()
        listing = list_pairs(job.input, job.options)
        if listing.format == "folder" and self.out.is_relative_to(os.path.realpath(listing.root)):
            raise ValueError(f"out: expected a folder outside the input, all of which is read, got {job.out}")
        if listing.spans is not None:
            extras.require("webdataset")
        fingerprint = listing.fingerprint()
        if len(set(gather_objects(fingerprint))) > 1:
            raise ValueError("input: expected the same files and rows for all processes, got others for some")
        if not job.skip_bad and not listing.n_images:
            listing.whole(SKIP)  # else the pictures are looked at first, so that all that is bad is told at once
        model = job.model(listing.captions)
        run = self._describe(fingerprint, model)
        if complete:
            return self._finished(run)
        with workplace(self.partial, run, self.rank, fresh=job.fresh) as place:
            listing, mine, digests, sizes = self._look(place, listing, model)
            if job.settings.compat and len(listing.captions) != listing.n_images:
                raise ValueError(
                    "compat: expected one caption for each image, because the authors' noise belongs to captions and "
                    f"a picture can hold one; got {len(listing.captions)} captions of {listing.n_images} images"
                )
            with closing(self._source(listing, model, digests)) as source:
                part = Part(source, torch.tensor(mine))
                if sizes is not None:
                    _, *size = model.image_shape
                    grid = (size[0] * job.settings.grid, size[1] * job.settings.grid)
                    part = Pictures(source, torch.tensor(mine), sizes, grid)
                self._check_space(place, source, mine, part, sizes)
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
        if not isinstance(manifest, dict) or manifest.get("run") != json_hash(run):
            raise FileExistsError(f"out: expected a new or empty folder, got {self.job.out}")
        if self.rank == 0 and self.partial.is_dir():  # killed between the last two steps
            with locked(self.partial / "lock-0"):
                remove_run(self.partial)
            with suppress(OSError):
                self.partial.rmdir()
        return manifest

    def _source(self, listing: Listing, model: Model, digests: Tensor | None = None) -> DiskSource:
        job = self.job
        return DiskSource(listing, model.image_shape, digests=digests, threads=job.threads, max_pixels=job.max_pixels)

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
        path = place.folder / f"scan-{self.rank}.pt"
        if path.exists():
            found = read_state(path, "out")
        else:
            with closing(self._source(listing, model)) as source:

                def told(done: int, n: int) -> None:
                    self.progress("checking pictures", done, n, "")

                seen = scan(source, mine, told, whole=not self.job.thumbnails)
                triggers = 0 if self.job.settings.compat else self.job.method.triggers
                bad = unreadable_captions(listing, mine, model.tokenizer, triggers)
                bad |= unwritable_samples(source, mine)
                bad |= unwritable_files(listing, place.folder) if self.rank == 0 else {}
                sizes = None if seen.sizes is None else seen.sizes[mine]
                found = {"digests": seen.digests[mine], "bad": bad | seen.bad, "notes": seen.notes, "sizes": sizes}
        parts = gather_objects(found)
        bad = {number: why for part in parts for number, why in part["bad"].items()}
        if (bad or listing.bad) and not self.job.skip_bad:
            # Nothing is kept: they may be mended before the next try.
            raise BadData([*listing.bad, *bad_pictures(listing, bad)], SKIP)
        if not path.exists():
            write_state(path, found)
        digests = torch.cat([part["digests"] for part in parts])
        self.notes = dict(sum((Counter(part["notes"]) for part in parts), Counter[str]()))
        keep = [number for number in range(listing.n_images) if number not in bad]
        usable = listing.without(list(bad), bad_pictures(listing, bad, published=True))
        kept = [new for new, number in enumerate(keep) if mine[0] <= number <= mine[-1]]
        counts = gather_objects(len(kept))
        if min(counts) < 2:
            each = " for each process" if len(counts) > 1 else ""
            raise ValueError(f"input: expected at least two usable images{each}, got {', '.join(map(str, counts))}")
        sizes = None if self.job.thumbnails else torch.cat([part["sizes"] for part in parts])[keep]
        return usable, kept, digests[keep], sizes

    def _check_space(
        self, place: Workplace, source: DiskSource, mine: list[int], part: Part, sizes: Tensor | None
    ) -> None:
        job = self.job
        if self.rank == 0:
            check_space(
                source,
                mine,
                place.folder,
                eps=0 if job.method.noise == "none" else job.settings.eps,
                noise_shape=part.noise_shape,
                noise_files=2 * (job.method.generates and job.method.noise != "universal") + job.noise_on_disk,
                reference_files=job.reference_files,
                sizes=sizes,
            )
        barrier()

    def _generate(self, place: Workplace, part: Part, model: Model, captions: Sequence[str]) -> Protection:
        job = self.job
        store = None
        if job.method.noise != "random":  # which the protection draws itself, the same every time
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
            captions=captions,
        )
        stage, note = f"generate {job.method.name}", ""
        for index in range(place.load(protection), protection.rounds):
            self.progress(stage, index, protection.rounds, note)
            protection.round(index)
            place.save(index + 1, protection)
            note = f"surrogate loss {protection.losses['noise'][-1]:.3f}"
        if protection.rounds:
            self.progress(stage, protection.rounds, protection.rounds, note)
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
        publisher.write(lambda done, total: self.progress("writing", done, total, ""))
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
            check_complete(place.publish, {MANIFEST, *hashes})
        barrier()
        return dict(read_json(place.publish / MANIFEST))
