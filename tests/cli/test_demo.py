"""The whole demo at a small size: what it writes, that it is reproducible, and that an interruption costs nothing."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from rich.console import Console

import ccu_fast
from ccu_fast.cli import demo
from ccu_fast.cli.report import page, tables
from ccu_fast.cli.report.tables import Table, all_tables, spread
from ccu_fast.cli.report.terminal import show
from ccu_fast.files import write_whole
from tests.support import small_demo
from tests.support.forked import fork, kill_when
from tests.support.html_page import faults
from tests.support.mem_datasets import read_export

PARTS = 6  # two scenarios, four methods


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in small_demo.REPLACEMENTS:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures take longer than the figures; one test looks at them."""
    monkeypatch.setattr(page, "write_report", lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Figures are the same for the same number of threads, and a forked child has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def without_times(value: Any) -> Any:
    """Everything but the seconds and what is computed from them."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "cpu_seconds", "ratio")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def half_written(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.startswith(".") or ".tmp" in p.name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of one run without an interruption, and what it returned."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in small_demo.REPLACEMENTS:
            patch.setattr(module, name, value)
        folder = tmp_path_factory.mktemp("demo") / "whole"
        return folder, demo.run(folder, quiet=True)


def test_writes_a_report_with_everything_in_it(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, returned = whole
    stored = json.loads((folder / "results.json").read_text())
    assert set(stored["unlearn"]) == {"class", "instances"}
    assert set(stored["protect"]) == {"clean", "random-3", "em", "mem"}
    assert stored["versions"]["ccu_fast"] == ccu_fast.__version__

    html = (folder / "report.html").read_text()
    pictures = re.findall(r'src="([^"]*)"', html)
    assert len(pictures) == 3 * 4 * 3 and all(p.startswith("data:image/png;base64,") for p in pictures)
    assert html.count('<div class="wide" role="img"') == 2 * 2 + 2  # maps and curves
    assert faults(html) == []
    part = stored["unlearn"]["class"]["0"]
    ccu = part["metrics"]["ccu"]
    assert ccu["worst_gap"]["points"] >= ccu["average_gap"] > 0 and ccu["verdict"]["kind"] != "passed"  # two steps
    assert part["setting"]["sizes"]["forget_train"] == part["setting"]["forget_items"]
    assert "what moved" in html and html.index("what moved") < html.index("What mostly stayed")
    for table in all_tables(returned):
        for cell in (cell for row in table.rows for cell in row):
            assert escape(cell) in html
    images, captions = read_export(folder / "protected" / "mem")
    assert len(images) == len(captions) == 64
    assert half_written(folder.parent) == []


@pytest.mark.usefixtures("small", "no_report")
def test_progress_and_tables_have_the_words_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(tmp_path)
    told = capsys.readouterr()
    stages = list(
        dict.fromkeys(
            re.sub(r" \d+/\d+.*|, (at it|loss|train loss|surrogate).*", "", line) for line in told.err.splitlines()
        )
    )
    parts = ["forgetting a class", "forgetting random instances"]
    models = ["before unlearning", "retrained, visual hidden", "CCU"]
    learning = [f"victim of {label}" for label in tables.PROTECT_LABELS.values()]
    expected = ["demo", *(f"{part}: {stage}" for part in parts for stage in [*models, "audit"]), *learning]
    shown = [stage for stage in stages if stage in expected]
    assert shown == expected and "writing the page" in stages
    assert [stage for stage in stages if stage.startswith("protecting, ")] == [
        f"protecting, {tables.PROTECT_LABELS[method]}" for method in ("em", "mem")
    ]
    assert all(name in told.out for name in (*models, *tables.PROTECT_LABELS.values()))
    # No name of a method, a part or a file of the program.
    assert not re.search(r"\w_\w|seed0|random-3|\bem\b|\bmem\b|gold", told.err.partition("Report:")[0])


@pytest.mark.usefixtures("small", "no_report")
def test_a_folder_that_the_demo_did_not_write_stays(tmp_path: Path) -> None:
    mine = tmp_path / "protected" / "clean" / "mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(FileExistsError, match=r"out: expected a new or empty folder, got .*clean"):
        demo.run(tmp_path, only="protect", quiet=True)
    assert mine.exists()


@pytest.mark.usefixtures("small", "no_report")
def test_a_finished_part_is_not_computed_again_unless_its_format_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "[/bold]"  # no markup
    computed: list[str] = []
    compute = demo._compute

    def counting(part: demo.Part, out: Path, progress: Any) -> dict[str, Any]:
        computed.append(part.name)
        return compute(part, out, progress)

    monkeypatch.setattr(demo, "_compute", counting)
    first = demo.run(out, only="unlearn", quiet=True)
    assert computed == ["unlearn-class-seed0", "unlearn-instances-seed0"]
    again = demo.run(out, only="unlearn", quiet=True)
    assert len(computed) == 2 and again == first
    monkeypatch.setattr(demo, "FORMAT", demo.FORMAT + 1)
    demo.run(out, only="unlearn", quiet=True)
    assert len(computed) == 4


@pytest.mark.usefixtures("small", "no_report")
def test_kill_9_loses_at_most_the_part_that_was_running_and_every_figure_comes_again(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Each part is computed again here, before or after the kill, so this also shows that figures are reproducible."""
    out = tmp_path / "killed"
    child = fork(lambda: demo.run(out, quiet=True))
    kill_when(child, lambda: len(list((out / "parts").glob("[!.]*.json"))) >= 2, seconds=120)
    before = {p.name: p.stat().st_mtime_ns for p in (out / "parts").glob("[!.]*.json")}
    for path in before:
        json.loads((out / "parts" / path).read_text())
    assert 2 <= len(before) < PARTS and not (out / "results.json").exists()

    demo.run(out, quiet=True)
    after = {p.name: p.stat().st_mtime_ns for p in (out / "parts").glob("[!.]*.json")}
    assert before.items() <= after.items() and len(after) == PARTS
    resumed, uninterrupted = (json.loads((folder / "results.json").read_text()) for folder in (out, whole[0]))
    assert without_times(resumed) == without_times(uninterrupted)


@pytest.mark.usefixtures("small")
def test_ctrl_c_leaves_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, only="unlearn", quiet=True)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    write_whole(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "error"), [({"seeds": 0}, "seeds"), ({"only": "everything"}, "only: expected one of")]
)
def test_bad_input(tmp_path: Path, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        demo.run(tmp_path, quiet=True, **arguments)


def test_spread() -> None:
    assert spread([0.5]) == "0.500"
    assert spread([0.4, 0.6]) == "0.500 ± 0.141"
    assert spread([None]) == "–"


@pytest.mark.parametrize("width", [80, 60])
def test_tables_are_whole_in_a_narrow_terminal(width: int, whole: tuple[Path, dict[str, Any]]) -> None:
    console = Console(width=width, file=io.StringIO())
    tables = all_tables(whole[1], brief=True)
    for table in tables:
        show(table, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    text = " ".join(lines)
    for table in tables:  # nothing is folded but words, and nothing is cut
        numbers = [i for i, title in enumerate(table.columns) if i and title not in table.words]
        assert [row[i] for row in table.rows for i in numbers if row[i] not in text] == [], text
        shown = re.findall(r"\S+", text)
        words = [word for cells in (table.columns, *table.rows) for cell in cells for word in cell.split()]
        assert set(words) <= set(shown), set(words) - set(shown)


def test_the_longest_verdict_is_not_cut() -> None:
    console = Console(width=80, file=io.StringIO())
    row = ["retrained, visual hidden", ".000", ".497", "+91.9 vis. U test", "28.38", "38.406", "over-generalised"]
    columns = ["method", "visual U", "MIA", "worst gap", "gap", "time", "verdict"]
    show(Table("caption", columns, [row], words=("worst gap", "verdict")), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80 and all(cell in " ".join(lines) for cell in row[1:])


def test_names_are_text_on_the_page_and_not_html(tmp_path: Path) -> None:
    result = {
        "sizes": {"<i>items": 1},
        "cost": {},
        "provenance": {"weights_sha256": "0", "model": "<i>"},
        "rows": [("<i>accuracy", 0.5, 0.25)],
        "verdict": {"kind": "ineffective", "text": "<i>"},
        "alarm": None,
        "losses": [1.0],
        "embeddings": None,
    }
    page.write_run(result, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<i>" not in html and html.count("&lt;i&gt;") == 4
    first = re.search("<p>(.*)</p>", html)
    assert first is not None and first[1].startswith("Verdict") and "ineffective" in first[1]
