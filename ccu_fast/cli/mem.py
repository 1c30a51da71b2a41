"""``ccu-fast protect`` and ``ccu-fast evaluate``. Each imports what it needs when it runs."""

# No `from __future__ import annotations`: typer reads the annotations.
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ccu_fast import check, extras
from ccu_fast.cli.console import live, one_sentence
from ccu_fast.files import output_file, write_whole

CONFIG_HELP = "TOML file with options by their names (eps = 8, skip-bad = true); flags win."
MODEL_HELP = "small, small:WIDTH (a multiple of 32), open_clip:NAME or hf:FOLDER."
FORMAT_HELP = "csv, folder, imagefolder or webdataset; recognised if not given."


def _read_config(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """The file's values become the defaults of the options."""
    if value is None:
        return None
    tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        given = tomllib.loads(value.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"config: expected a TOML file, got {value} ({error})") from error
    known = {str(p.name).rstrip("_") for p in context.command.params} - {"help", "config"}
    named = {name.replace("-", "_"): item for name, item in given.items()}
    unknown = sorted(set(named) - known)
    if unknown:
        raise ValueError(f"config: expected options of {context.command.name} in {value}, got {', '.join(unknown)}")
    context.default_map = named
    return value


Config = Annotated[Path | None, typer.Option("--config", help=CONFIG_HELP, callback=_read_config, is_eager=True)]


@one_sentence("protect")
def protect(
    input: Annotated[Path, typer.Argument(help="A .csv or .tsv, a .tar or a folder of them, or a folder of pictures.")],
    out: Annotated[Path, typer.Option(help="New or empty folder for the protected dataset.")],
    method: Annotated[
        str, typer.Option(help="mem[-n], em, trigger[-n], tap, uap, random[-n] or clean; n trigger words.")
    ] = "mem-3",
    model: Annotated[str, typer.Option(help="The surrogate: " + MODEL_HELP)] = "small",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights the surrogate starts from.")] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH: what pictures are resized to and published in [64x64].")
    ] = None,
    grey: Annotated[bool, typer.Option("--grey", help="One channel instead of three.")] = False,
    eps: Annotated[int, typer.Option(help="Largest change of a pixel, in 1/255.", min=0, max=127)] = 8,
    step: Annotated[int, typer.Option(help="Step of the noise, in 1/255.", min=1, max=127)] = 1,
    pgd_steps: Annotated[int, typer.Option(help="Steps of the noise for each batch and round.", min=0)] = 6,
    rounds: Annotated[int, typer.Option(help="Surrogate steps, trigger pass, noise pass.", min=1)] = 9,
    surrogate_steps: Annotated[int, typer.Option(help="Steps of the surrogate in each round.", min=0)] = 32,
    trigger_rounds: Annotated[int, typer.Option(help="First rounds, in which triggers change.", min=0)] = 3,
    candidates: Annotated[int, typer.Option(help="Words tried at each trigger position.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Pairs in a batch (of each process).", min=2)] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of the surrogate.", min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    format: Annotated[str | None, typer.Option(help=FORMAT_HELP)] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of paths [images or file_name].")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions [caption or text].")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and list what cannot be used, instead of stopping.")
    ] = False,
    max_pixels: Annotated[int, typer.Option(help="Larger pictures are bad.", min=1)] = 178_956_970,
    noise_on_disk: Annotated[bool, typer.Option("--noise-on-disk", help="Noise in a file, not in memory.")] = False,
    reference_files: Annotated[
        bool, typer.Option("--reference-files", help="Also noise.pt and token.pt of the authors' code.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw an unfinished run with this output away.")] = False,
    threads: Annotated[int | None, typer.Option(help="Decoders [one for each processor].", min=1)] = None,
    device: Annotated[str, typer.Option(help="Of the surrogate: cpu, cuda, cuda:1.")] = "cpu",
    autocast: Annotated[str | None, typer.Option(help="bf16 or fp16: the towers' products [full precision].")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory order of the pictures.")] = False,
    compile: Annotated[
        str | None,
        typer.Option(help="default, reduce-overhead (CUDA graphs) or max-autotune: torch.compile the image tower."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live progress, no summary.")] = False,
    config: Config = None,
) -> None:
    """Write a copy of an image-caption dataset that teaches a model less (MEM): noise in the pictures, words in front
    of the captions. The copy has the input's layout, lossless pictures and a manifest.json.

    An interrupted run goes on when the same command is given again. With torchrun, processes share the work.
    """
    extras.require("rich", "PIL")
    import torch

    from ccu_fast.data.captions import Options
    from ccu_fast.mem.config import Execution, Method, Settings
    from ccu_fast.mem.job import Job, protect_dataset
    from ccu_fast.mem.job.models import choose

    precisions = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if autocast not in precisions:
        raise ValueError(f"autocast: expected bf16 or fp16, got {autocast!r}")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    job = Job(
        input,
        out,
        choose(model, size=size, grey=grey, checkpoint=checkpoint),
        Method.parse(method),
        Settings(
            eps=eps,
            step=step,
            pgd_steps=pgd_steps,
            rounds=rounds,
            surrogate_steps=surrogate_steps,
            trigger_rounds=trigger_rounds,
            candidates=candidates,
            batch=batch,
            lr=lr,
        ),
        seed,
        Options(format, image_column, caption_column),
        skip_bad=skip_bad,
        fresh=fresh,
        noise_on_disk=noise_on_disk,
        reference_files=reference_files,
        threads=threads,
        max_pixels=max_pixels,
        device=check.device("device", device),
        execution=Execution(precisions[autocast], channels_last, compile),
    )
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    with live(quiet) as progress:
        manifest = protect_dataset(job, progress)
    if not quiet:
        _tell(out, manifest)


@one_sentence("evaluate", goes_on=False)
def evaluate(
    train: Annotated[list[str], typer.Argument(help="Datasets to learn from, PATH or NAME=PATH.")],
    test: Annotated[Path, typer.Option(help="Clean pairs to retrieve among.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
    model: Annotated[str, typer.Option(help="The victim: " + MODEL_HELP)] = "small",
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of what the victim sees [64x64].")] = None,
    grey: Annotated[bool, typer.Option("--grey", help="One channel instead of three.")] = False,
    epochs: Annotated[int, typer.Option(help="Of each victim.", min=1)] = 15,
    batch: Annotated[int, typer.Option(help="Pairs in a batch.", min=2)] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.", min=0)] = 1e-3,
    seeds: Annotated[int, typer.Option(help="Victims for each dataset.", min=1)] = 1,
    treatment: Annotated[
        list[str] | None,
        typer.Option(help="jpeg, blur, crop or no-trigger: victims of what these leave, too; may be repeated."),
    ] = None,
    zero_shot: Annotated[
        Path | None, typer.Option(help="Pictures whose captions name their class: do victims know it?")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="HTML page: table, curves, samples.")] = None,
    device: Annotated[str, typer.Option(help="Of the victims: cpu, cuda, cuda:1.")] = "cpu",
    format: Annotated[str | None, typer.Option(help=FORMAT_HELP)] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of paths [images or file_name].")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions [caption or text].")] = None,
    threads: Annotated[int | None, typer.Option(help="Decoders [one for each processor].", min=1)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live progress, no table.")] = False,
    config: Config = None,
) -> None:
    """Train models from scratch on datasets, protected or not, and say what they have learned: retrieval among clean
    test pairs after the last and after the best epoch.
    """
    extras.require("rich", "PIL", *(["matplotlib"] if report else []))
    from ccu_fast.data.captions import Options
    from ccu_fast.mem.job.models import choose
    from ccu_fast.mem.job.victims import evaluate_datasets
    from ccu_fast.mem.victim import Recipe

    named = {}
    for item in train:
        name, equals, path = item.partition("=")
        named.update({name: Path(path)} if equals else {Path(item).stem: Path(item)})
    if len(named) != len(train):
        raise ValueError(f"train: expected datasets with different names (NAME=PATH), got {train}")
    for option, file in (("out", out), ("report", report)):
        if file is not None:
            output_file(file, option)
    for option, data in (*(("train", path) for path in named.values()), ("test", test), ("zero_shot", zero_shot)):
        if data is not None and not data.exists():
            raise ValueError(f"{option}: expected a file or folder, got {data}, which is not there")
    with live(quiet) as progress:
        result = evaluate_datasets(
            named,
            test,
            choose(model, size=size, grey=grey),
            recipe=Recipe(epochs=epochs, batch=batch, lr=lr),
            seeds=range(seeds),
            treatments=treatment or (),
            zero_shot=zero_shot,
            device=device,
            samples=0 if report is None else 6,
            options=Options(format, image_column, caption_column),
            threads=threads,
            progress=progress,
        )
    # What cost most is told first: a full disk then loses no figure.
    if not quiet:
        _table(result)
    samples = result.pop("samples")  # pictures belong into the page
    if out is not None:
        write_whole(out, json.dumps(result, indent=1) + "\n")
    if report is not None:
        from ccu_fast.cli.report.protection import write_evaluation

        write_evaluation({**result, "samples": samples}, report)


def _tell(out: Path, manifest: dict[str, Any]) -> None:
    from rich.console import Console

    measured, skipped = manifest["measured"], manifest["skipped"]["count"]
    quality = ", ".join(
        text
        for text, value in (
            (f"largest change {measured['eps_255']}/255", measured["eps_255"]),
            (f"PSNR {measured['psnr_db'] or 0:.1f} dB", measured["psnr_db"]),
            (f"SSIM {measured['ssim'] or 0:.4f}", measured["ssim"]),
        )
        if value is not None
    )
    console = Console(highlight=False)
    console.print(f"{manifest['images']} images, {manifest['rows']} captions in {out}: {quality}")
    if skipped:
        console.print(f"{skipped} items left out; manifest.json lists them")


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console

    from ccu_fast.cli.report.tables import evaluation_table, show

    # A table that is cut loses figures: where the width is not known (a file, a pipe), it is as wide as it needs.
    console = Console()
    show(evaluation_table(result), console if console.is_terminal else Console(width=160))
