"""``python -m benchmarks`` and ``ccu-fast bench``: run, store, show; or compare stored results with the bars."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import bars, environment, figures, performance, plots, results, summary, tables
from benchmarks.console import say
from benchmarks.ops import OPS
from benchmarks.registry import Case, Op, label, select
from benchmarks.runner import run
from ccu_fast.files import output_folder

EXAMPLES = """examples:
  python -m benchmarks                                       everything, stored under benchmarks/results/<device>/
  python -m benchmarks --ops clip_loss --shapes B=8192       one shape
  python -m benchmarks --ops clip_loss --shapes B=300,D=100  a shape that is not listed
  python -m benchmarks --quick                               small shapes, printed only: does everything run?
  python -m benchmarks --minutes 5                           start no case after 5 minutes, and name those left out
  python -m benchmarks --check                               the bars, from stored results
  python -m benchmarks --report                              pages and figures of docs, from stored results
  python -m benchmarks --plots                               <operation>-speed.svg, -memory.svg beside stored results
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        for op in arguments.ops:
            if op not in OPS:
                raise ValueError(f"ops: expected some of {', '.join(OPS)}, got {op!r}")
        if arguments.report or arguments.plots or arguments.check:
            out = arguments.out or results.FOLDER
            reported = _report(out) if arguments.report else 0
            drawn = _plots(out) if arguments.plots else 0
            # Stored results and bars of a device can be read without having one.
            kind = arguments.device or environment.choose_device(None).type
            checked = _check(out, kind, strict=arguments.strict) if arguments.check else 0
            return reported or drawn or checked
        device = environment.choose_device(arguments.device)
        cases = _cases(arguments, device)
    except ValueError as error:
        print(f"ccu-fast bench: {error}", file=sys.stderr)
        return 2

    facts = environment.describe(device)
    stored = arguments.out or (None if arguments.quick else results.FOLDER)
    folder = None if stored is None else output_folder(stored / environment.slug(device))
    seconds = arguments.seconds if arguments.seconds is not None else (0.2 if arguments.quick else 3.0)
    deadline = time.monotonic() + 60 * arguments.minutes
    late = [case for case in cases if not _measure(case, facts, seconds, folder, deadline)]
    if late:
        print("out of time, not measured: " + "; ".join(f"{case.op.name} {label(case.shape)}" for case in late))
    if folder is not None:
        print(f"stored in {folder}")
    return 0


def _measure(case: Case, facts: dict[str, Any], seconds: float, folder: Path | None, deadline: float) -> bool:
    """Run and store one case, unless it is too late to start it."""
    if time.monotonic() > deadline:
        return False
    rows = run(case, facts, seconds=seconds, say=say)
    tables.show(rows)
    if folder is not None:  # after every case: an interrupted run keeps what it has
        results.write(folder, rows)
        tables.write_readme(folder)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--shapes", nargs="+", default=[], metavar="B=…,D=…", help="only these sizes, or new ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="small shapes; nothing is stored without --out")
    parser.add_argument("--no-compiled", action="store_true", help="leave out what torch.compile has to compile")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="no providers whose names begin so")
    parser.add_argument("--seconds", type=float, help="timing budget of a case (3; quick 0.2); at least 2 rounds")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case later than this")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {results.FOLDER.name}/ beside this file")
    parser.add_argument("--check", action="store_true", help="measure nothing; stored figures against bars.json")
    parser.add_argument("--report", action="store_true", help="measure nothing; write pages and the figures of docs")
    parser.add_argument("--plots", action="store_true", help="measure nothing; draw what is stored")
    parser.add_argument("--strict", action="store_true", help="with --check: exit 1 unless every bar is met")
    return parser


def _cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = [
        Case(_chosen(OPS[name], arguments.no_compiled, arguments.without), shape, dtype, device)
        for name in arguments.ops
        for shape in select(OPS[name], arguments.shapes, device.type, arguments.quick)
    ]
    if not cases:
        raise ValueError(f"shapes: expected sizes of {', '.join(arguments.ops)}, got {' '.join(arguments.shapes)}")
    return cases


def _chosen(op: Op, no_compiled: bool, without: Sequence[str]) -> Op:
    left = [p for p in op.providers if not (no_compiled and p.compiled) and not p.name.startswith(tuple(without))]
    return replace(op, providers=left)


def _report(out: Path) -> int:
    """The pages that are made from the stored rows."""
    folders = _folders(out)
    if not folders:
        return 1
    for folder in folders:
        tables.write_readme(folder)
    written = [*(folder / "README.md" for folder in folders), summary.write(out)]
    if out == results.FOLDER:
        written += [performance.write(), *figures.write()]
    print("\n".join(f"wrote {path}" for path in written))
    return 0


def _plots(out: Path) -> int:
    """Pictures of the stored rows, which are not kept with them."""
    drawn = [path for folder in _folders(out) for path in plots.write(folder)]
    print("\n".join(f"wrote {path}" for path in drawn) or "no plots")
    return 0 if drawn else 1


def _folders(out: Path) -> list[Path]:
    """The devices that have rows."""
    folders = sorted(folder for folder in out.glob("*") if folder.is_dir() and results.read(folder))
    if not folders:
        print(f"no results in {out}")
    return folders


def _check(out: Path, device: str, *, strict: bool) -> int:
    owed = [bar for bar in bars.load() if bar.device == device]
    folders = sorted(folder for folder in out.glob(f"{device}-*") if folder.is_dir())
    all_met = bool(folders)
    for folder in folders:
        print(folder.name)
        lines, met = bars.check(owed, results.read(folder))
        print("\n".join(lines))
        all_met = all_met and met
    if not folders:
        print(f"no results for {device} in {out}")
        print("\n".join(bars.check(owed, [])[0]))
    return 0 if all_met or not strict else 1


if __name__ == "__main__":
    sys.exit(main())
