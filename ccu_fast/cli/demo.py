"""``ccu-fast demo``: unlearn and protect real digits, then write ``report.html`` and ``results.json``.

The work is cut into parts (one scenario of one seed, one protection method of one seed). A finished part is written to
``parts/`` at once, so an interrupted demo goes on where it stopped; parts of another version, setting or FORMAT are
redone.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ccu_fast import check
from ccu_fast.cli.console import live
from ccu_fast.cli.report.findings import FORGOTTEN, findings
from ccu_fast.cli.report.tables import PROTECT_LABELS, all_tables
from ccu_fast.cli.report.terminal import show
from ccu_fast.data.captions.listing import MANIFEST
from ccu_fast.files import output_folder, write_whole
from ccu_fast.mem.config import Settings
from ccu_fast.mem.study import run_digit_strips
from ccu_fast.mem.victim import Recipe
from ccu_fast.runs import cache
from ccu_fast.runs.progress import Progress
from ccu_fast.runs.provenance import json_hash, versions
from ccu_fast.unlearn.study.methods import ONCE
from ccu_fast.unlearn.study.run import run_task
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS

VARIANTS = {"unlearn": SCENARIOS, "protect": tuple(PROTECT_LABELS)}
# Of the kept parts. Raise it whenever the same settings and versions give other figures, or figures of another form.
FORMAT = 6
SECONDS = 180  # of one seed of both halves on two idle cores, to be told at the start
COMPARED = (*ONCE, "gold_again")  # the second retraining tells how far two of them are apart
# The threads too: how many of them add up decides the last bits of the protection.
MADE_WITH = ("ccu_fast", "torch", "python", "machine", "threads")


@dataclass(frozen=True)
class Part:
    """One piece of work."""

    half: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Also its file's."""
        return f"{self.half}-{self.variant}-seed{self.seed}"

    @property
    def title(self) -> str:
        """In the words of the report."""
        what = f"forgetting {FORGOTTEN[self.variant]}" if self.half == "unlearn" else PROTECT_LABELS[self.variant]
        return what if self.seed == 0 else f"{what}, seed {self.seed}"


def run(out: str | Path, *, seeds: int = 1, only: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run the demo and write its report.

    Args:
        out: folder for ``report.html``, ``results.json``, ``parts/`` and ``protected/`` (the published data sets of
            seed 0); made if needed.
        seeds: how many, at least 1; the report shows mean and spread.
        only: "unlearn" or "protect" runs that half alone.
        quiet: no live progress and no closing table.

    Returns:
        What ``results.json`` holds: versions, settings, and every figure by half, variant and seed. All but the
        seconds are the same for the same machine, version and thread count.

    Raises:
        ValueError: seeds below 1, an unknown half, a damaged part.
        OSError: ``out`` cannot be written.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.text import Text

    from ccu_fast.cli.report.page import write_report

    check.integer("seeds", seeds, low=1)
    if only is not None:
        check.one_of("only", only, tuple(VARIANTS))
    out = output_folder(Path(out))
    console = Console(stderr=True, quiet=quiet)
    parts = [
        Part(half, variant, seed)
        for half, variants in VARIANTS.items()
        if only in (None, half)
        for seed in range(seeds)
        for variant in variants
    ]
    results: dict[str, Any] = {"versions": versions(*MADE_WITH), "seeds": seeds, "unlearn": {}, "protect": {}}
    started = time.perf_counter()
    minutes = SECONDS * seeds / 60 / (1 if only is None else 2)
    console.print(f"{len(parts)} parts, up to {minutes:.2g} min on two idle cores; what is finished is kept")
    with live(quiet) as progress:
        progress("demo", 0, len(parts), "")
        for done, part in enumerate(parts):
            progress("demo", done, len(parts), part.title)
            path = out / "parts" / f"{part.name}.json"
            value = cache.part(path, _key(part), partial(_compute, part, out, progress))
            results[part.half].setdefault(part.variant, {})[str(part.seed)] = value
        write_whole(out / "results.json", json.dumps(cache.without(results, "embeddings", "examples"), indent=1) + "\n")
        progress("writing the page", 0, 1, "")
        write_report(results, out / "report.html")
    if not quiet:
        shown = Console()
        for sentence in findings(results):
            shown.print(Text(f"{sentence}\n"))
        for table in all_tables(results, brief=True):
            show(table, shown)
    console.print(f"{time.perf_counter() - started:.0f} s. Report: [bold]{escape(str(out / 'report.html'))}[/bold]")
    return results


def _compute(part: Part, out: Path, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    if part.half == "unlearn":

        def heard(stage: str, *rest: Any) -> None:
            progress(f"{part.title}: {stage}", *rest)

        value = run_task(TASKS["digits-halves"], part.seed, part.variant, methods=COMPARED, progress=heard)
    else:
        published = out / "protected"
        if part.seed == 0 and (published / part.variant / MANIFEST).is_file():
            # Left by a run that was killed after the export and before its part was written.
            shutil.rmtree(published / part.variant)
        own = published if part.seed == 0 else None
        value = run_digit_strips(part.seed, (part.variant,), progress, own, labels={part.variant: part.title})
    value["seconds"] = time.perf_counter() - started
    return value


def _key(part: Part) -> str:
    if part.half == "unlearn":
        task = TASKS["digits-halves"]
        settings = [asdict(task.ccu[part.variant]), asdict(task.training)]
    else:
        settings = [asdict(Settings()), asdict(Recipe())]
    return json_hash([{"demo": FORMAT}, versions(*MADE_WITH), [part.name, settings]])
