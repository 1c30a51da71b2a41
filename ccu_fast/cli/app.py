"""The commands of ``ccu-fast``."""

# No `from __future__ import annotations`: typer reads the annotations.
import importlib
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ccu_fast import extras, info
from ccu_fast._version import __version__
from ccu_fast.cli import mem
from ccu_fast.cli import unlearn as commands_unlearn
from ccu_fast.cli import verify as commands_verify
from ccu_fast.cli.console import loading, one_sentence
from ccu_fast.cli.usage import Command, Group
from ccu_fast.ops import machine

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Part(str, Enum):
    """One half of the demo."""

    unlearn = "unlearn"
    protect = "protect"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fused kernels for contrastive losses and gradient token scoring, and the systems built on them."""


@app.command("info", cls=Command, epilog="Example: ccu-fast info --json > ccu_fast_info.json")
@one_sentence("info")
def info_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this installation can do on this machine and, for what it cannot, why."""
    info.main(["--json"] if as_json else [])


@app.command(cls=Command, epilog="Example: ccu-fast demo --out report --only unlearn")
@one_sentence("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json, made if needed.")] = Path(
        "ccu_fast_demo"
    ),
    seeds: Annotated[int, typer.Option(help="How many seeds to average over.", min=1)] = 1,
    only: Annotated[Part | None, typer.Option(help="Run one half alone.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live progress.")] = False,
) -> None:
    """Unlearn a class and protect a data set, on real digits, and write a report with the figures."""
    with loading("demo", quiet):
        extras.require("rich", "sklearn", "matplotlib", "jinja2", "PIL")
        run = importlib.import_module("ccu_fast.cli.demo").run
    run(out, seeds=seeds, only=only.value if only else None, quiet=quiet)


app.command("unlearn", cls=Command, epilog=commands_unlearn.EXAMPLE)(commands_unlearn.unlearn)


@app.command(
    cls=Command,
    epilog="Example: ccu-fast bench -- --help",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
@one_sentence("bench", goes_on=False)
def bench(context: typer.Context) -> None:
    """Measure the operations against their peers. Options go to python -m benchmarks in the checkout."""
    for root in (Path.cwd(), machine.PACKAGE.parent):
        if (root / "benchmarks" / "__main__.py").exists() and (root / "csrc" / "ccu_fast.h").exists():
            sys.path.insert(0, str(root))
            raise SystemExit(importlib.import_module("benchmarks.__main__").main(context.args) or 0)
    raise FileNotFoundError("expected to run in the folder of a checkout: the installed package has no benchmarks")


for command, example in (
    (mem.protect, "ccu-fast protect flickr8k/train.csv --out flickr8k-protected --method mem-3 --eps 8"),
    (mem.evaluate, "ccu-fast evaluate clean=train.csv mem=protected --test test.csv --out figures.json"),
):
    app.command(cls=Command, epilog=f"Example: {example}")(command)
app.command("verify", cls=Command, epilog=commands_verify.EXAMPLE)(commands_verify.verify)
