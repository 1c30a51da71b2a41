"""A whole visit to a GPU: smoke test, benchmarks, tests, sanitizer, tuning; everything it finds in one archive.

    python -m benchmarks.visit --out visit --minutes 9           everything; 4 minutes: smoke test, most main rows
    python -m benchmarks.visit --out visit --only tune           what decides the constants: smoke, bench, tests or tune
    python -m benchmarks.visit --out visit --wheels wheels       peers from: pip download --no-deps -d wheels inf_cl …
    python -m benchmarks.visit --out visit --tiny --python .venv/bin/python     the same steps anywhere, small shapes
    python -m benchmarks.visit --unpack visit/visit.tgz          back in a checkout: rows and tables into benchmarks/

It needs Python with torch and Triton, and a compiler, but no network, git, make, pip or matplotlib. A step that fails
or runs out of time is a line of the summary, and the next one starts. The most important steps come first, and the
archive is complete after every step.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import environment, results
from benchmarks.visit import archive, program, steps
from benchmarks.visit.steps import Done, Visit

SHOWN = 200  # characters of a step's line
PRINTED = 10_000  # characters at the end; where the end is all one gets to see, all of it should fit


def visit(
    out: Path,
    *,
    minutes: float,
    tiny: bool = False,
    python: Path | None = None,
    wheels: Path | None = None,
    ops: Sequence[str] = (),
    only: str | None = None,
    commit: str | None = None,
) -> Visit:
    """All steps in order; see the module's docstring."""
    if commit:
        os.environ[environment.COMMIT] = commit
    sha, dirty = environment.source()
    source = f"{sha}{'+changes' * bool(dirty)}" if sha else "unknown: pass --commit"
    if sha:
        # Every step is told: what the visit itself writes into a checkout is no change of what is measured.
        os.environ[environment.COMMIT] = source
    now = Visit(out.resolve(), 60 * minutes)
    now.note(Done("commit", "ok" if sha else "not run", said=source))
    if wheels is None:
        now.note(Done("peers", "not run", said="no --wheels; what is installed already is measured"))
    else:
        now.note(program.unpack_wheels(wheels, now.site))
    plan = program.Plan(tiny, python or Path(sys.executable), python is None, tuple(ops), only)
    program.execute(now, plan)
    return now


def ending(now: Visit) -> str:
    """What is printed last: the aims, the steps, the answers of tuning, the benchmark's table, as much as fits."""
    aims, *pages = (now.work / name for name in (program.AIMS, "tune/tune.md", "results/SUMMARY.md"))
    text = f"{aims.read_text()}\n" if aims.is_file() else ""
    text += "\n".join(line[:SHOWN] for line in now.table().splitlines()) + "\n"
    for page in pages:
        text += "\n" + page.read_text() if page.is_file() else ""
    return (
        text if len(text) <= PRINTED else text[: PRINTED - 40].rsplit("\n", 1)[0] + "\n… the rest is in the archive\n"
    )


def unpack(file: Path) -> int:
    """The archive's rows and tables into this checkout, and every page that is made from them."""
    from benchmarks.__main__ import main as bench

    folder = results.FOLDER.parent
    written = archive.unpack(file, folder)
    print("\n".join(f"wrote {path}" for path in written))
    rows = [row for path in written if path.parent.parent == results.FOLDER for row in results.read(path.parent)]
    commits = sorted({str(row.environment.get("git_sha")) for row in rows})
    code = bench(["--report"])
    print(f"measured at {', '.join(commits)}\ngit add {folder.name}/results {folder.name}/visits docs")
    print("then, for the sentences that say that no GPU has run this: pytest tests/benchmarks/visit/test_home.py")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the visit; exit code 1 if any step failed or ran out of time."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.visit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    way = parser.add_mutually_exclusive_group()
    # A visit that ends at a forgotten option costs the start of a machine.
    folder = Path(os.environ.get("OUT") or "out")
    help_out = "gets visit.tgz and summary.md; by default the folder that the variable OUT names, or out"
    way.add_argument("--out", type=Path, metavar="DIR", default=folder, help=help_out)
    way.add_argument("--unpack", type=Path, metavar="FILE", help="of an earlier visit; nothing is run")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (9)")
    parser.add_argument("--only", choices=program.PARTS, help="one part, and what it needs")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU: do the steps work?")
    parser.add_argument("--python", type=Path, help="an interpreter that has the package built; nothing is built")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of peers, such as inf_cl and memeff")
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="measure and exercise only these")
    parser.add_argument("--commit", metavar="SHA", help="of this copy, where it has no .git; or in a file COMMIT")
    arguments = vars(parser.parse_args(argv))
    file = arguments.pop("unpack")
    signal.signal(signal.SIGTERM, steps.end)  # so that what was started ends too
    try:
        if file is not None:
            return unpack(file)
        now = visit(**arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(ending(now))
    return int(any(d.status in ("failed", "out of time") for d in now.done))


if __name__ == "__main__":
    sys.exit(main())
