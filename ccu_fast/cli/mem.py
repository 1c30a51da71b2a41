"""``ccu-fast protect`` and ``ccu-fast evaluate``."""

# No `from __future__ import annotations`: typer reads the annotations.
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ccu_fast import check, extras
from ccu_fast.cli.console import live, one_sentence, printable, tidied, to_copy
from ccu_fast.cli.options import Config, Fields, with_fields
from ccu_fast.data.captions import Options
from ccu_fast.data.captions.listing import MANIFEST, is_text
from ccu_fast.distributed.ranks import own_device
from ccu_fast.files import after_the_work, output_file, write_whole
from ccu_fast.mem.config import Execution, Method, Settings
from ccu_fast.mem.config import strength as values_of
from ccu_fast.mem.job import Job, estimate, protect_dataset
from ccu_fast.mem.publish.rehearse import size_text
from ccu_fast.mem.victim import Recipe

_FIELDS_SHOWN = 8
MODEL_HELP = "small, small:WIDTH (a multiple of 32), open_clip:NAME or hf:FOLDER."


def _take_strength(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
    """The strength's values become the defaults of the options that have no other from the file."""
    if value is not None:
        context.default_map = {**values_of(value), **(context.default_map or {})}
    return value


Strength = Annotated[
    str | None,
    typer.Option(
        "--strength",
        help="light, medium or strong: other defaults of method, trigger words and place; flags and --config win.",
        callback=_take_strength,
        is_eager=True,
    ),
]


@one_sentence("protect")
@with_fields
def protect(
    input: Annotated[
        Path, typer.Argument(help="A .csv, .tsv or .parquet, a .tar, or a folder of tars or of pictures.")
    ],
    out: Annotated[Path, typer.Option(help="New or empty folder for the protected dataset.")],
    *,
    method: Annotated[
        str,
        typer.Option(help="mem[-n], em, trigger[-n], text-noise[-n], tap, uap, random[-n] or clean; n trigger words."),
    ] = "mem-3",
    strength: Strength = None,
    model: Annotated[str, typer.Option(help="The surrogate: " + MODEL_HELP)] = "small",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights the surrogate starts from.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH: pictures become thumbnails, resized, cut and published so; else they stay."),
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH: what a small surrogate sees of pictures that keep their size [64x64]."),
    ] = None,
    grey: Annotated[bool, typer.Option("--grey", help="One channel instead of three.")] = False,
    settings: Annotated[dict[str, Any], Fields(Settings)],
    options: Annotated[dict[str, Any], Fields(Options)],
    run: Annotated[dict[str, Any], Fields(Job)],
    device: Annotated[str, typer.Option(help="Of the surrogate: cpu, cuda, cuda:1.")] = "cpu",
    autocast: Annotated[
        str | None, typer.Option(help="bf16 or fp16: the towers' products; else full precision.")
    ] = None,
    execution: Annotated[dict[str, Any], Fields(Execution)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all input, say what the run would take; write nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live progress, no summary.")] = False,
    config: Config = None,
) -> None:
    """Write a copy of an image-caption dataset that teaches a model less (MEM): noise in the pictures, words in front
    of the captions. The copy has the input's layout, lossless pictures of their own size (of --size: thumbnails) and a
    manifest.json.

    An interrupted run goes on when the same command is given again. With torchrun, processes share the work.
    --dry-run tells what it will take; the exit status is 1 if it would not begin.
    """
    extras.require("rich", "PIL")
    import torch

    from ccu_fast.mem.job.models import choose_model

    if size is not None and input_size is not None:
        raise ValueError(f"input_size: expected without size, which says what the surrogate sees, got {input_size!r}")
    if input_size is not None and model.partition(":")[0] != "small":
        raise ValueError(f"input_size: expected with a small surrogate alone, got {input_size!r} and {model!r}")
    precisions = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if autocast not in precisions:
        raise ValueError(f"autocast: expected bf16 or fp16, got {autocast!r}")
    job = Job(
        input,
        out,
        choose_model(model, size=size, input_size=input_size, grey=grey, checkpoint=checkpoint),
        Method.parse(method),
        Settings(**settings),
        options=Options(**options),
        thumbnails=size is not None,
        device=check.device("device", own_device(device)),
        execution=Execution(precisions[autocast], **execution),
        **run,
    )
    if dry_run:
        with tidied(), live(quiet) as progress:
            found = estimate(job, progress)
        _tell_estimate(found, job.skip_bad)
        if not found["ready"]:
            raise typer.Exit(1)
        return
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    with live(quiet) as progress:
        already = (out / MANIFEST).is_file()
        manifest = protect_dataset(job, progress)
    if not quiet:
        with after_the_work(f"the protected dataset is whole in {out}"):
            _tell(out, manifest, already)
            _tell_next(job, manifest, grey=grey)


@one_sentence("evaluate", goes_on=False)
@with_fields
def evaluate(
    train: Annotated[list[str], typer.Argument(help="Datasets to learn from, PATH or NAME=PATH.")],
    test: Annotated[Path, typer.Option(help="Clean pairs to retrieve among.")],
    *,
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
    model: Annotated[str, typer.Option(help="The victim: " + MODEL_HELP)] = "small",
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of what the victim sees [64x64].")] = None,
    grey: Annotated[bool, typer.Option("--grey", help="One channel instead of three.")] = False,
    recipe: Annotated[dict[str, Any], Fields(Recipe)],
    seeds: Annotated[int, typer.Option(help="Victims for each dataset.", min=1)] = 1,
    treatment: Annotated[
        list[str] | None,
        typer.Option(
            help="jpeg, blur, crop, resize, grey, median, nlmeans, learned, no-trigger, some-trigger, no-common or "
            "some of these with a plus: victims of what these leave, too; may be repeated."
        ),
    ] = None,
    zero_shot: Annotated[
        Path | None, typer.Option(help="Pictures whose captions name their class: do victims know it?")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="HTML page: table, curves, samples.")] = None,
    device: Annotated[str, typer.Option(help="Of the victims: cpu, cuda, cuda:1.")] = "cpu",
    options: Annotated[dict[str, Any], Fields(Options)],
    threads: Annotated[int | None, typer.Option(help="Decoders; one for each processor if not given.", min=1)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live progress, no table.")] = False,
    config: Config = None,
) -> None:
    """Train models from scratch on datasets, protected or not, and say what they have learned: retrieval among clean
    test pairs after the last and after the best epoch.
    """
    extras.require("rich", "PIL", *(["matplotlib", "jinja2"] if report else []))
    from ccu_fast.mem.job.models import choose_model
    from ccu_fast.mem.job.victims import evaluate_datasets

    named = {}
    for item in train:
        name, equals, path = item.partition("=")
        if not equals or Path(item).exists() or ("/" in name and not Path(path).exists()):  # an = of the path itself
            name, path = Path(item).stem, item
        if not name or not path:
            raise ValueError(f"train: expected PATH or NAME=PATH, got {item!r}")
        named[name] = Path(path)
    if len(named) != len(train):
        raise ValueError(f"train: expected datasets with different names (NAME=PATH), got {train}")
    for name in named:
        if not is_text(name):
            raise ValueError(f"train: expected names of text, got {name!r} (NAME=PATH gives another)")
    inputs = [*(("train", path) for path in named.values()), ("test", test)]
    inputs += [("zero_shot", zero_shot)] if zero_shot is not None else []
    for option, data in inputs:
        if not data.exists():
            raise ValueError(f"{option}: expected a file or folder, got {data}, which is not there")
    read = [data.resolve() for _, data in inputs]
    for option, file in (("out", out), ("report", report)):
        if file is not None:
            if file.resolve() in read:
                raise ValueError(f"{option}: expected another file than the data, got {file}")
            output_file(file, option)
    if out is not None and report is not None and out.resolve() == report.resolve():
        raise ValueError(f"report: expected another file than out, got {report}")
    figures = _Figures(out)
    if not quiet:
        figures.tell_of_earlier_ones()
    try:
        with live(quiet) as bars:

            def keep(found: dict[str, Any], whole: bool) -> None:
                figures.keep(found)
                if whole and not quiet:
                    with bars.paused():
                        figures.show()

            result = evaluate_datasets(
                named,
                test,
                choose_model(model, size=size, grey=grey),
                recipe=Recipe(**recipe),
                seeds=range(seeds),
                treatments=treatment or (),
                zero_shot=zero_shot,
                device=device,
                samples=0 if report is None else 6,
                options=Options(**options),
                threads=threads,
                progress=bars,
                keep=keep,
            )
            figures.keep(result, complete=True)
            if report is not None:
                from ccu_fast.cli.report.page import write_evaluation

                bars("writing the report", 0, 1, "")
                write_evaluation(result, report)
    except BaseException:
        if not figures.found:
            raise
        with after_the_work(figures.tell()):
            raise


class _Figures:
    """What an evaluation has found so far, in its file and in the terminal, so that no victim is trained in vain."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.found: dict[str, Any] = {}
        self._written = self._shown = False

    def keep(self, result: dict[str, Any], *, complete: bool = False) -> None:
        """Write the figures to the file, if there is to be one."""
        if result.get("datasets") != self.found.get("datasets"):
            self._shown = False
        self.found, self._written = {**result, "datasets": dict(result.get("datasets", {}))}, False
        if self.out is not None:
            # Pictures belong into the page.
            kept = {name: value for name, value in result.items() if name != "samples"}
            write_whole(self.out, json.dumps({"complete": complete, **kept}, indent=1) + "\n")
            self._written = True

    def show(self) -> None:
        """Print the table."""
        from rich.console import Console

        from ccu_fast.cli.report.findings import nothing_learned
        from ccu_fast.cli.report.tables import evaluation_table
        from ccu_fast.cli.report.terminal import show

        # A cut table loses figures: where the width is not known (a file, a pipe), it is as wide as it needs.
        console = Console()
        show(evaluation_table(self.found), console if console.is_terminal else Console(width=160))
        if (said := nothing_learned(self.found)) is not None:
            Console(highlight=False).print(said)
        self._shown = True

    def tell(self) -> str:
        """After an error: where the figures are. They are shown, even if nothing was to be."""
        if not self._shown:
            self.show()
        return "the figures are above" + (f" and in {self.out}" if self._written else "")

    def tell_of_earlier_ones(self) -> None:
        """Say what an evaluation that was interrupted has left in the file."""
        if self.out is None or not self.out.is_file():
            return
        try:
            there = json.loads(self.out.read_bytes())
            names = ", ".join(there["datasets"]) if there["complete"] is False else ""
        except (OSError, ValueError, RecursionError, TypeError, KeyError):  # another program's
            return
        if names:
            place = os.fsencode(self.out).decode(errors="backslashreplace")
            print(printable(f"{place} has figures of an interrupted evaluation ({names}); new ones replace them"))


def _tell(out: Path, manifest: dict[str, Any], already: bool) -> None:
    measured, skipped = manifest["measured"], manifest["skipped"]["count"]
    quality = f"largest change {measured['eps_255']}/255"
    if measured["psnr_db"] is not None:
        quality += f", PSNR {measured['psnr_db']:.1f} dB"
    if measured["ssim"] is not None:
        quality += f", SSIM {measured['ssim']:.4f}"
    place = os.fsencode(out).decode(errors="backslashreplace")
    if already:
        print("complete already, nothing was done; pictures that have changed since need another --out")
    print(printable(f"{manifest['images']} images, {manifest['rows']} captions in {place}: {quality}"))
    size = manifest["thumbnails"]
    print("pictures kept their size" if size is None else f"pictures were resized to {size[0]}x{size[1]} (--size)")
    if skipped:
        print(f"{skipped} item{'s' * (skipped != 1)} left out; manifest.json lists them")
    found = manifest["captions_elsewhere"]
    if found["replaced"]:
        print(f"clean captions replaced in other fields: {_fields(found['replaced'])}")
    if found["kept"]:
        fields = _fields(found["kept"])
        print(f"clean captions stay as parts of other fields: {fields}; check them before you publish")


def _tell_next(job: Job, manifest: dict[str, Any], *, grey: bool) -> None:
    """What to do before the dataset is published, as commands to copy."""
    out = job.out
    size = manifest["thumbnails"]
    seen = [] if size is None else ["--size", f"{size[0]}x{size[1]}"]
    seen += ["--grey"] if grey else []
    for name, value in asdict(job.options).items():
        seen += [] if value is None else ["--" + name.replace("_", "-"), value]
    preview = f"{out}-preview.html"
    verified = to_copy("ccu-fast", "verify", out, "--original", job.input, "--preview", preview)
    compared = to_copy("ccu-fast", "evaluate", f"clean={job.input}", f"protected={out}", *seen, "--test", "PAIRS")
    print("\nnext, check what you publish and look at it:")
    print(printable(f"  {verified}"))
    print("measure what a model learns from it; PAIRS are clean pairs that are not in it:")
    print(printable(f"  {compared}"))
    print(printable(f"publish {out} alone: README.md in it tells its readers what was done, the originals undo it"))


def _tell_estimate(found: dict[str, Any], skip_bad: bool) -> None:
    """What a run would take, and every item that it cannot use."""
    print(f"{found['images']} images, {found['rows']} captions can be used")
    if found["bad"]:
        print(f"{len(found['bad'])} bad items" + (", which --skip-bad leaves out:" if skip_bad else " (--skip-bad):"))
        for item in found["bad"]:
            print(printable(f"  {item['where']}: {item['why']}"))
    if "seconds" not in found:
        return
    sizes = (f"{name} {size[0]}x{size[1]}" for name, size in found["pictures"].items())
    print(f"pictures as published: {', '.join(sizes)}")
    disk, memory = found["disk_bytes"], [size_text(found["memory_bytes"])]
    if "device_memory_bytes" in found:
        memory.append(f"{size_text(found['device_memory_bytes'])} on the GPU")
    print(f"disk: about {size_text(disk['needed'])} needed, {size_text(disk['free'])} free")
    print(f"memory: about {', '.join(memory)}")
    for name, phase in found["phases"].items():
        print(f"{name}: {phase['batches']} batches of {phase['seconds']:.3g} s")
    parts = ", ".join(f"{name} {_time(spent)}" for name, spent in found["seconds"].items() if name != "total")
    print(f"time: about {_time(found['seconds']['total'])} ({parts})")


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _fields(counts: dict[str, int]) -> str:
    """Names of fields with their counts, in what the terminal can show."""
    shown = [f"{name} ({n})" for name, n in list(counts.items())[:_FIELDS_SHOWN]]
    more = [f"and {len(counts) - _FIELDS_SHOWN} more in manifest.json"] if len(counts) > _FIELDS_SHOWN else []
    return printable(", ".join([*shown, *more]))
