"""What is made from stored benchmark rows: pages, plots, the README's table; whether the committed ones are current."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, plots, results, summary, tables
from benchmarks.__main__ import main
from benchmarks.environment import REPOSITORY
from benchmarks.results import Row

DEVICES = sorted(path for path in results.FOLDER.glob("*") if path.is_dir())


def row(provider: str, b: int, ms: float, **more: Any) -> Row:
    values: dict[str, Any] = {"op": "clip_loss", "shape": {"B": b, "D": 512}, "dtype": "float32", "device": "cpu"}
    values |= {"role": "peer", "arithmetic": "working", "p50_ms": ms, "environment": {"device": "a machine"}}
    return Row(**{**values, "provider": provider, **more})


def measured(folder: Path, *, sizes: int = 3) -> Path:
    """Rows as a run of several shapes leaves them."""
    rows = []
    for b in (128, 1024, 4096)[:sizes]:
        rows += [
            row("open_clip", b, 8.0, peak_extra_bytes=40_000_000, speedup_over={"one_gemm": 0.5}),
            row("one_gemm", b, 4.0, peak_extra_bytes=30_000_000, speedup_over={"open_clip": 2.0}),
            row("ccu_fast", b, 2.0, role="ours", peak_extra_bytes=10_000_000, share_of_floor=0.75,
                speedup_over={"open_clip": 4.0, "one_gemm": 2.0}),
            row("ccu_fast_64mib", b, 3.0, role="ours", speedup_over={"open_clip": 2.7}),
            row("wrong", b, 1.0, status="wrong", p50_ms=None),
        ]  # fmt: skip
    results.write(folder, rows)
    return folder


def test_a_line_names_whom_it_compares_with(tmp_path: Path) -> None:
    table = summary.lines(results.read(measured(tmp_path, sizes=1)))
    assert table == [["clip_loss", "B=128, D=512", "2", "4.00 open_clip", "2.00 one_gemm", "75%", "40 → 10"]]


def test_the_fastest_peer_is_the_one_that_makes_us_look_slowest(tmp_path: Path) -> None:
    rows = results.read(measured(tmp_path, sizes=1))
    next(r for r in rows if r.provider == "ccu_fast").speedup_over = {"open_clip": 4.0, "one_gemm": 0.5}
    assert summary.lines(rows)[0][3:5] == ["4.00 open_clip", "0.50 one_gemm"]


def test_a_page_gets_the_table_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks" / "results"
    measured(out / "cpu-a")
    page = tmp_path / "README.md"
    page.write_text("no markers\n")
    assert summary.update_pages(out, tmp_path) == []
    page.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    assert summary.update_pages(out, tmp_path) == [page]
    text = page.read_text()
    assert text.startswith(f"before\n{summary.BEGIN}\n") and text.endswith(f"{summary.END}\nafter\n")
    assert "old" not in text and "4.00 open_clip" in text and "(benchmarks/results/cpu-a/README.md)" in text
    assert summary.update_pages(out, tmp_path) == [page] and page.read_text() == text
    with pytest.raises(ValueError, match="page: expected the line"):
        summary.splice(summary.BEGIN, "text")


@pytest.mark.parametrize(("sizes", "drawn"), [(3, "times faster than open_clip"), (1, "ms")])
def test_plots_show_every_provider_and_do_not_change(tmp_path: Path, sizes: int, drawn: str) -> None:
    pytest.importorskip("matplotlib")
    (path,) = plots.write(measured(tmp_path, sizes=sizes))
    picture = path.read_bytes()
    text = picture.decode()
    assert path.name == "clip_loss.svg"
    assert drawn in text and all(name in text for name in ("open_clip", "one_gemm", "ccu_fast", "ccu_fast_64mib"))
    plots.write(tmp_path)
    assert path.read_bytes() == picture


def test_report_makes_everything_from_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", "--out", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().out
    measured(tmp_path / "cpu-a", sizes=1)
    readme = (REPOSITORY / "README.md").read_bytes()
    assert main(["--report", "--check", "--device", "cpu", "--out", str(tmp_path)]) == 0
    owed = sum(bar.device == "cpu" for bar in bars.load())
    assert f"{owed} bars: 0 met, 0 not met, {owed} not measured" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "cpu-a").iterdir()} == {"clip_loss.json", "clip_loss.svg", "README.md"}
    assert "![time and memory of clip_loss](clip_loss.svg)" in (tmp_path / "cpu-a" / "README.md").read_text()
    assert "4.00 open_clip" in (tmp_path / "SUMMARY.md").read_text()
    assert (REPOSITORY / "README.md").read_bytes() == readme  # only the project's own results go there


def test_a_report_without_matplotlib_lacks_the_plots_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(tmp_path / "cpu-a", sizes=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert main(["--report", "--out", str(tmp_path)]) == 0
    assert "cpu-a: no plots, matplotlib is not installed" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "cpu-a").iterdir()} == {"clip_loss.json", "README.md"}
    assert "4.00 open_clip" in (tmp_path / "SUMMARY.md").read_text()


def test_what_a_gpu_owes_is_listed_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--device", "cuda", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    owed = [bar for bar in bars.load() if bar.device == "cuda"]
    assert len(owed) > 30
    assert printed.count("not measured ") == len(owed)
    assert f"{len(owed)} bars: 0 met, 0 not met, {len(owed)} not measured" in printed
    assert main(["--check", "--device", "cuda", "--strict", "--out", str(tmp_path)]) == 1


# --- the committed files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", DEVICES, ids=lambda path: path.name)
def test_the_committed_page_is_what_its_files_make(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / folder.name)
    tables.write_readme(tmp_path / folder.name)
    assert (tmp_path / folder.name / "README.md").read_text() == (folder / "README.md").read_text()
    assert {path.stem for path in folder.glob("*.svg")} == {path.stem for path in folder.glob("*.json")}


def test_the_committed_tables_are_what_the_files_make() -> None:
    assert DEVICES
    assert (results.FOLDER / "SUMMARY.md").read_text().endswith(summary.fragment(results.FOLDER))
    link = f"{results.FOLDER.relative_to(REPOSITORY)}/"
    for name in summary.PAGES:
        page = (REPOSITORY / name).read_text()
        assert summary.splice(page, summary.fragment(results.FOLDER, link)) == page, "run python -m benchmarks --report"


def test_every_file_that_facts_names_exists() -> None:
    page = REPOSITORY / "benchmarks" / "FACTS.md"
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert len(links) > 5
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []
