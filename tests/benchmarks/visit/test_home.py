"""A visit's archive at home: tables, plots and aims take a GPU's rows, and pages no longer say that there are none."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import bars, plots, results, summary, tables
from benchmarks.ops import OPS
from benchmarks.visit import archive
from build_support.docs.blocks import pages
from tests.benchmarks.visit import made_up
from tests.support.paths import ROOT

# Pages that people write, and what makes the others. Those of libraries and of examples speak of what no visit runs.
SOURCES = [
    *pages(),
    *(ROOT / name for name in ("benchmarks/FACTS.md", "benchmarks/performance.py", "benchmarks/figures.py")),
    ROOT / "build_support" / "hub.py",
]
OTHERS = ("docs/performance.md", "docs/libraries/", "docs/examples/")
NEVER = re.compile(
    r"\b(?:nothing|none|no (?:kernel|GPU|figure)[^.|]{0,40}|not|never)\b[^.|]{0,30}"
    r"(?:\b(?:run|ran|timed|comes?)\b[^.|]{0,20}\bGPU\b|\bon a GPU\b(?= \|))"
    r"|\bno GPU (?:figures|has run|speed)\b",
    re.IGNORECASE,
)
READ_FIRST = {"README.md", "docs/limits.md", "docs/index.md", "benchmarks/FACTS.md", "benchmarks/performance.py"}


def said() -> dict[str, list[str]]:
    """The sentences by the file to edit."""
    found = {}
    for page in SOURCES:
        text = re.sub(r"[\s*]+", " ", page.read_text(encoding="utf-8"))
        name = page.relative_to(ROOT).as_posix()
        if not name.startswith(OTHERS) and (sentences := NEVER.findall(text)):
            found[name] = sentences
    return found


def test_pages_say_that_nothing_ran_on_a_gpu_as_long_as_that_is_so() -> None:
    measured = sorted(path.name for path in results.FOLDER.glob("cuda-*"))
    found = said()
    if measured:
        assert not found, f"there are rows of {', '.join(measured)}: edit these, run python -m benchmarks --report"
    else:
        assert found.keys() >= READ_FIRST, "where a reader with a GPU would look"


def test_rows_of_a_gpu_fill_every_table_plot_and_aim(tmp_path: Path) -> None:
    rows, work, home = made_up.rows(), tmp_path / "work", tmp_path / "benchmarks"
    results.write(work / "results" / made_up.DEVICE, rows)
    (work / "aims.md").write_text(bars.page(rows))
    results.store(work / "memory.json", {"device": "cuda"}, depth=1)
    (work / "logs").mkdir()
    (work / "logs" / "commands.2.log").write_text("{}\n")
    archive.pack(work, tmp_path / archive.NAME)
    written = archive.unpack(tmp_path / archive.NAME, home)
    folder = home / "results" / made_up.DEVICE
    stored = results.read(folder)
    assert {(r.op, r.provider) for r in stored} == {(r.op, r.provider) for r in rows}
    notes = {path.name for path in written if path.parent == home / "visits" / made_up.DEVICE}
    assert notes == {"aims.md", "memory.json", "commands.2.txt"}

    tables.write_readme(folder)
    page = (folder / "README.md").read_text()
    assert page.startswith("# NVIDIA made up\n") and "CUDA 13.0, driver 580" in page and "(triton) at c0ffee" in page
    measured = {name for name, op in OPS.items() if op.shapes["cuda"]}
    assert set(re.findall(r"^## (\w+)$", page, re.MULTILINE)) == measured
    assert "**NVIDIA made up** (" in summary.fragment(home / "results")  # threads are a CPU's
    assert {path.name for path in plots.write(folder)} == {
        f"{o}-{w}.svg" for o in measured for w in ("speed", "memory")
    }
    (answers,) = (path.read_text() for path in written if path.name == "aims.md")
    assert "29 aims: " in answers and " 0 not measured" in answers
    assert "| noise_update B=128,H=224,R=512 | ≥ 0.85 of the speed of a copy of the same bytes | 0.9 | met |" in answers
    assert "| topk_flips N=2560,V=49408,D=512,k=16 | ≥ 8 times faster than naive | 3 | NOT MET |" in answers
