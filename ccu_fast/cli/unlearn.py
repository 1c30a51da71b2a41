"""``ccu-fast unlearn``: a run on one's own model and data, or a comparison of methods on these or on embedded tasks."""

# No `from __future__ import annotations`: typer reads the annotations.
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ccu_fast import check, extras
from ccu_fast.cli.console import ALARMED, FLAGS, live, loading, one_sentence, printable, tell, to_copy
from ccu_fast.cli.options import Fields, with_fields
from ccu_fast.distributed.ranks import own_device
from ccu_fast.files import after_the_work
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.settings import Job, read_job

EXAMPLE = (  # an empty line between two: they would be run together otherwise
    "Examples:\n\n"
    "ccu-fast unlearn settings.toml --out clean --steps 100\n\n"
    "ccu-fast unlearn settings.toml --compare --out audit\n\n"
    "ccu-fast unlearn --compare --task digits-halves --seeds 3"
)


@one_sentence("unlearn")
@with_fields
def unlearn(
    settings: Annotated[
        Path | None, typer.Argument(help="TOML: model, data, what to forget (ccu_fast.unlearn.settings shows one).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of what is written; made if needed.")] = Path("ccu_fast_unlearn"),
    *,
    model: Annotated[
        str | None, typer.Option(help="open_clip:NAME, hf:FOLDER or module:function, in place of that in the settings.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File of the model's, in place of those in the settings.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the forward passes: fp32, bf16 or fp16; as set if not given, or fp32.")
    ] = None,
    classes: Annotated[
        list[str] | None, typer.Option(help="A class to forget, by name or number; may be repeated.")
    ] = None,
    budget: Annotated[dict[str, Any], Fields(Budget, given=True)],
    ccu: Annotated[dict[str, Any], Fields(UnlearnConfig, given=True)],
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare methods, on the data of the settings or on the embedded tasks.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(help="With --compare, without settings: a task; may be repeated; all if not given."),
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="With --compare, without settings: class or instances; both if not given.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="With --compare: how many; if not given as set, or 1; of tasks 3.", min=1)
    ] = None,
    text_membership: Annotated[
        bool, typer.Option("--text-membership", help="Also ask, by text alone, who was trained on; needs new items.")
    ] = False,
    device: Annotated[str, typer.Option(help="Of the model and the data: cpu, cuda, cuda:1.")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw an earlier run with this output away.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live progress, no table.")] = False,
) -> None:
    """Take the visual knowledge of a forget set out of a trained model; a killed run goes on where it was.

    With torchrun, processes share a run. Exit status 3: the model is not to be used (not forgotten, retain collapsed,
    nothing trainable matches).
    """
    if settings is None and not compare:
        print("ccu-fast unlearn: expected a settings file or --compare", file=sys.stderr)
        raise SystemExit(2)
    if compare and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("ccu-fast unlearn: expected one process for --compare, got several by torchrun", file=sys.stderr)
        raise SystemExit(2)
    chosen = {"model": model, "weights": weights, "dtype": dtype}
    given = {"model": chosen, "ccu": ccu, "budget": budget, "forget": {"classes": classes or None}}
    given["audit"] = {"text_membership": text_membership or None}
    overrides = {name: {k: v for k, v in table.items() if v is not None} for name, table in given.items()}
    of_settings = [name for table in overrides.values() for name in table] + ["device"] * (device != "cpu")
    of_tasks = [name for name, value in (("task", task), ("scenario", scenario)) if value]
    refused = {
        "with a settings file": [] if settings else of_settings,
        "with --compare and without a settings file": of_tasks if settings else [],
        "with --compare": ["seeds"] * (seeds is not None and not compare),
        "without --compare, where other settings make new parts": ["fresh"] * (fresh and compare),
    }
    for goes, unused in refused.items():
        if not unused:
            continue
        typed = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        print(f"ccu-fast unlearn: expected {typed} only {goes}", file=sys.stderr)
        raise SystemExit(2)
    job = None
    if settings is not None:
        job = replace(read_job(settings, overrides), device=check.device("device", own_device(device)))
    quiet = quiet or int(os.environ.get("RANK", "0")) > 0
    with loading("unlearn", quiet):
        extras.require("rich", "safetensors", "sklearn", "matplotlib", "jinja2")
        importlib.import_module("ccu_fast.cli.report.page")  # what the rest imports takes no time then
    if job is None:
        _compare(out, task, scenario, seeds or 3, quiet)
    elif compare:
        _compare_own(job, out, seeds, quiet)
    else:
        _run(job, out, fresh, quiet, _audit(cast(Path, settings), overrides, device, out))


def _audit(settings: Path, overrides: dict[str, dict[str, Any]], device: str, out: Path) -> str:
    """The command that compares a run with other methods, with the options that the run had."""
    words: list[object] = ["ccu-fast", "unlearn", settings, "--compare", "--out", f"{out}-audit"]
    given = {name: value for table in overrides.values() for name, value in table.items()}
    for name, value in (given | ({"device": device} if device != "cpu" else {})).items():
        flag = FLAGS["unlearn"][name]
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [flag] if one is True else [flag, one]
    return to_copy(*words)


def _tell_next(job: Job, out: Path, audit: str) -> None:
    """What to do with the model, as Python and a command to copy."""
    from ccu_fast.unlearn.card import loading as python

    print("\nnext, load it:")
    for line in python(job.model, str(out / "model.safetensors")).splitlines():
        print(printable(f"  {line}"))
    print("audit it beside other methods and, where there is one, a retrained model:")
    print(printable(f"  {audit}"))
    if job.test is None:
        print("  (it needs test pairs: test in [data] of the settings)")
    print(printable(f"give {out / 'card.md'} along with the model"))


def _run(job: Job, out: Path, fresh: bool, quiet: bool, audit: str) -> None:
    from rich.console import Console

    from ccu_fast.cli.report.page import write_failure, write_run
    from ccu_fast.cli.report.tables import before_after_table, text_table, told
    from ccu_fast.cli.report.terminal import show
    from ccu_fast.unlearn.job import run_job

    with live(quiet) as progress:

        def report(result: dict[str, Any]) -> None:
            with after_the_work(f"the unlearned model and results.json are in {out}"), progress.paused():
                if "rows" not in result:  # the error is told where it ends the command
                    write_failure(result["alarm"], out / "report.html")
                    return
                progress("writing the report", 0, 1, "")
                write_run(result, out / "report.html")
                if result["alarm"]:
                    tell("unlearn", result["alarm"]["text"])
                if not quiet:
                    print(told(result["verdict"]))
                    if "text_membership" in result:
                        print(result["text_membership"]["text"])
                    for table in filter(None, [before_after_table(result["rows"]), text_table(result, brief=True)]):
                        show(table, Console())
                print(f"{out / 'model.safetensors'}  {out / 'report.html'}", flush=True)
                if not quiet and not result["alarm"]:
                    _tell_next(job, out, audit)

        alarm = run_job(job, out, fresh=fresh, progress=progress, report=report)["alarm"]
    if alarm:
        raise SystemExit(ALARMED)


def _compare_own(job: Job, out: Path, seeds: int | None, quiet: bool) -> None:
    from rich.console import Console

    from ccu_fast.cli.report.page import write_own_comparison
    from ccu_fast.cli.report.tables import depth_table, left_out_table, unlearn_tables
    from ccu_fast.cli.report.terminal import show
    from ccu_fast.unlearn.study.own import compare_own

    if seeds is not None:
        job = replace(job, compare=replace(job.compare, seeds=seeds))
    with live(quiet) as progress:
        results = compare_own(job, out, progress=progress)
        with after_the_work(f"the figures are in {out / 'results.json'}"):
            progress("writing the report", 0, 1, "")
            write_own_comparison(results, out / "report.html")
    with after_the_work(f"the figures are in {out / 'results.json'}"):
        if not quiet:
            by_seed = results["unlearn"][job.data.name][job.config.forget]
            tables = [*unlearn_tables(job.config.forget, by_seed, brief=True), depth_table(by_seed, brief=True)]
            for table in filter(None, [*tables, left_out_table(results["left_out"])]):
                show(table, Console())
        print(f"{out / 'results.json'}  {out / 'report.html'}")


def _compare(out: Path, tasks: list[str] | None, scenarios: list[str] | None, seeds: int, quiet: bool) -> None:
    from rich.console import Console

    from ccu_fast.cli.report.page import write_comparison
    from ccu_fast.cli.report.tables import unlearn_tables
    from ccu_fast.cli.report.terminal import show
    from ccu_fast.unlearn.study.compare import compare
    from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS

    with live(quiet) as progress:
        results = compare(
            out, tasks=tasks or tuple(TASKS), scenarios=scenarios or SCENARIOS, seeds=range(seeds), progress=progress
        )
        with after_the_work(f"the figures are in {out / 'results.json'}"):
            progress("writing the report", 0, 1, "")
            write_comparison(results, out / "report.html")
    with after_the_work(f"the figures are in {out / 'results.json'}"):
        if not quiet:
            for by_scenario in results["unlearn"].values():
                for name, by_seed in by_scenario.items():
                    for table in unlearn_tables(name, by_seed, brief=True):
                        show(table, Console())
        print(f"{out / 'results.json'}  {out / 'report.html'}")
