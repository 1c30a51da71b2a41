"""What is generated from stored figures: files, pages, plots, tables; are the committed ones current?."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import (
    bars,
    charts,
    example_times,
    figures,
    host_time,
    measured_code,
    mem_phases,
    performance,
    plots,
    results,
    summary,
    tables,
    variants,
)
from benchmarks.__main__ import main
from benchmarks.compat import __main__ as compat
from benchmarks.distributed import __main__ as distributed
from benchmarks.environment import REPOSITORY
from benchmarks.exactness import __main__ as exactness
from benchmarks.protection import __main__ as protection
from benchmarks.protection import frontier, scale, scale_page
from benchmarks.protection import memory as surrogates
from benchmarks.results import Row
from benchmarks.unlearning import __main__ as unlearning
from benchmarks.unlearning import association_choices, associations, figure, text_membership, winners
from benchmarks.unlearning import scale as unlearning_scale
from benchmarks.unlearning.stored import by_seed, in_rows
from build_support.docs.generated import splice
from ccu_fast.cli.report.tables import independent, unlearn_tables

DEVICES = sorted(path for path in results.FOLDER.glob("*") if path.is_dir())
DEPTHS = {  # of every committed file of figures, as its command stores it
    "compat/results.json": 1,
    "compat/suites.json": 1,
    "distributed/results/*.json": distributed.DEPTH,
    "example_times.json": example_times.DEPTH,
    "exactness/results.json": 2,
    "host/results/*.json": host_time.DEPTH,
    "in_turn.json": 1,
    "in_turn_large.json": 1,
    "measured_code.json": measured_code.DEPTH,
    "protection/phases.json": mem_phases.DEPTH,
    "protection/digit-strips.json": protection.DEPTH,
    "protection/memory.json": surrogates.DEPTH,
    "protection/pictograms.json": protection.DEPTH,
    "protection/scale.json": scale.DEPTH,
    "results/*/*.json": 1,
    "small_batches.json": 2,
    "unlearning/losses.json": figure.DEPTH,
    "unlearning/association_choices.json": association_choices.DEPTH,
    "unlearning/associations.json": associations.DEPTH,
    "unlearning/results.json": 2,
    "unlearning/rates.json": 2,
    "unlearning/profile.json": 2,
    "unlearning/text_membership.json": text_membership.DEPTH,
    "unlearning/scale.json": unlearning_scale.DEPTH,
    "variants.json": 1,
    "visits/*/memory.json": surrogates.DEPTH,
    "visits/*/summary.json": 1,
    "visits/*/tune.json": 3,
}


SVG = "{http://www.w3.org/2000/svg}"


def texts(path: Path) -> set[str]:
    """What a picture says."""
    return {text.text or "" for text in ElementTree.parse(path).getroot().iter(f"{SVG}text")}


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
            row(
                "ccu_fast",
                b,
                2.0,
                role="ours",
                peak_extra_bytes=10_000_000,
                share_of_floor=0.75,
                speedup_over={"open_clip": 4.0, "one_gemm": 2.0},
            ),
            row("ccu_fast_64mib", b, 3.0, role="ours", speedup_over={"open_clip": 2.7}),
            row("wrong", b, 1.0, status="wrong", p50_ms=None),
        ]
    results.write(folder, rows)
    return folder


def test_a_row_is_a_line_and_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = {"first": {"ms": 1.5, "shape": {"B": 2}, "all": [1, 2]}, "second": {"ms": None, "shape": {}, "all": [[]]}}
    value = {"version": "1 é", "rows": rows, "seeds": [0, 1], "machine": {"threads": 2}, "none": {}}
    path = tmp_path / "figures.json"
    results.store(path, value, depth=2)
    assert json.loads(path.read_text()) == value
    assert path.read_text().splitlines() == [
        "{",
        '"version": "1 \\u00e9",',
        '"rows": {',
        ' "first": {"ms": 1.5, "shape": {"B": 2}, "all": [1, 2]},',
        ' "second": {"ms": null, "shape": {}, "all": [[]]}',
        "},",
        '"seeds": [0, 1],',
        '"machine": {"threads": 2},',
        '"none": {}',
        "}",
    ]
    assert [results.text(value, depth).count("\n") for depth in (0, 1, 2, 3, 4)] == [1, 7, 10, 18, 20]
    assert results.text([[{"a": (1, {2: 3})}]], 2) == '[\n[\n {"a": [1, {"2": 3}]}\n]\n]\n'


def test_a_changed_row_changes_one_line(tmp_path: Path) -> None:
    before = (measured(tmp_path) / "clip_loss.json").read_text().splitlines()
    rows = results.read(tmp_path)
    assert len(before) == 2 + len(rows)
    rows[3].speedup_over["open_clip"] = 5.0
    results.write(tmp_path, rows)
    after = (tmp_path / "clip_loss.json").read_text().splitlines()
    assert [old == new for old, new in zip(before, after, strict=True)].count(False) == 1


def test_a_file_of_figures_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    results.store(path, [1], depth=1)
    with pytest.raises(ValueError, match="JSON compliant"):
        results.store(path, [float("nan")], depth=1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.store(path, [2], depth=1)
    assert path.read_text() == "[1]\n"


def test_a_line_names_whom_it_compares_with(tmp_path: Path) -> None:
    table = summary.lines(results.read(measured(tmp_path, sizes=1)))
    assert table == [["clip_loss", "B=128, D=512", "2", "4.00 open_clip", "2.00 one_gemm", "75%", "40 → 10"]]


def test_the_fastest_peer_is_the_one_that_makes_us_look_slowest(tmp_path: Path) -> None:
    rows = results.read(measured(tmp_path, sizes=1))
    next(r for r in rows if r.provider == "ccu_fast").speedup_over = {"open_clip": 4.0, "one_gemm": 0.5}
    assert summary.lines(rows)[0][3:5] == ["4.00 open_clip", "0.50 one_gemm"]


@pytest.mark.parametrize("sizes", [3, 1])
def test_plots_show_ours_and_the_fastest_and_do_not_change(tmp_path: Path, sizes: int) -> None:
    paths = plots.write(measured(tmp_path, sizes=sizes))
    assert [path.name for path in paths] == ["clip_loss-speed.svg", "clip_loss-memory.svg"]
    before = [path.read_bytes() for path in paths]
    speed, memory = (texts(path) for path in paths)
    assert "times as fast as open_clip" in speed and "MB beyond the inputs" in memory
    assert {"ccu_fast", "open_clip", "one_gemm"} <= speed & memory and "wrong" not in speed | memory
    assert "ccu_fast_64mib" not in speed  # another way of ours, not the first
    assert ("4" in speed) and ("B (D=512)" in speed) == (sizes == 3) == ("B=128, D=512" not in speed)
    plots.write(tmp_path)
    assert [path.read_bytes() for path in paths] == before


def test_a_plot_has_at_most_five_lines(tmp_path: Path) -> None:
    rows = []
    for b in (128, 1024, 4096):
        over = {f"peer_{i}": 1.0 + i for i in range(7)} | {"open_clip": 2.0}
        rows += [row("open_clip", b, 8.0), row("ccu_fast", b, 4.0, role="ours", speedup_over=over)]
        rows += [row(f"peer_{i}", b, 8.0 - i, speedup_over={"open_clip": 8.0 / (8.0 - i)}) for i in range(7)]
    results.write(tmp_path, rows)
    (speed,) = plots.write(tmp_path)  # no row says how much memory it took
    assert {"ccu_fast", "open_clip", "peer_6", "peer_5", "peer_4"} <= texts(speed)
    assert not {"peer_3", "peer_2", "peer_1", "peer_0"} & texts(speed)
    line = charts.Line("one too many", [(1, 1)], 0)
    with pytest.raises(ValueError, match="chart: expected at most 5 lines or kinds of bars, got 6"):
        charts.lines("", charts.Scale("", (1, 2)), charts.Scale("", (1, 2)), [line] * 6)
    with pytest.raises(ValueError, match="ms: expected values from 1 to 8, got 9"):
        charts.bars("", [charts.Scale("ms", (1, 8))], [charts.Group("", [[charts.Bar(9.0, "9")]])])


@pytest.mark.parametrize("values", [[1.0], [0.3, 700.0], [1.0, 132.3], [0.0041, 14.6], [128.0, 16384.0]])
def test_ticks_are_powers_of_two_around_the_values(values: list[float]) -> None:
    ticks, said = charts.powers(values)
    assert ticks[0] <= min(values) and max(values) <= ticks[-1] and 2 <= len(ticks) == len(said) <= 7
    assert all(math.log2(tick) == int(math.log2(tick)) for tick in ticks)
    assert [float(Fraction(text)) for text in said] == ticks
    assert len({after / tick for tick, after in itertools.pairwise(ticks)}) == 1


def test_labels_at_the_ends_of_lines_do_not_lie_on_each_other() -> None:
    drawn = [charts.Line(f"line {i}", [(1, 1 + i / 100), (2, 2 - i / 100)], i) for i in range(5)]
    picture = ElementTree.fromstring(charts.lines("told", charts.Scale("x", (1, 2)), charts.Scale("y", (1, 2)), drawn))
    levels = sorted(
        float(text.get("y", "")) for text in picture.iter(f"{SVG}text") if (text.text or "").startswith("line")
    )
    assert len(levels) == 5
    assert all(low - high >= charts.GAP - 1.2 for high, low in itertools.pairwise(levels))
    assert levels[0] > 0 and levels[-1] < float(picture.get("height", ""))


def test_report_makes_everything_from_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", "--out", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().out
    measured(tmp_path / "cpu-a", sizes=1)
    page = performance.PAGE.read_bytes()
    assert main(["--report", "--check", "--device", "cpu", "--out", str(tmp_path)]) == 0
    owed = sum(bar.device == "cpu" for bar in bars.load())
    assert f"{owed} bars: 0 met, 0 not met, {owed} not measured" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "cpu-a").iterdir()} == {"clip_loss.json", "README.md"}
    assert "python -m benchmarks --plots" in (tmp_path / "cpu-a" / "README.md").read_text()
    assert "4.00 open_clip" in (tmp_path / "SUMMARY.md").read_text()
    assert performance.PAGE.read_bytes() == page  # only the project's own results go there


def test_plots_are_drawn_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plots", "--out", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().out
    measured(tmp_path / "cpu-a", sizes=1)
    assert main(["--plots", "--out", str(tmp_path)]) == 0
    drawn = [tmp_path / "cpu-a" / f"clip_loss-{what}.svg" for what in ("speed", "memory")]
    assert capsys.readouterr().out == "".join(f"wrote {path}\n" for path in drawn)
    assert set((tmp_path / "cpu-a").iterdir()) == {tmp_path / "cpu-a" / "clip_loss.json", *drawn}


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


def test_the_committed_tables_are_what_the_files_make() -> None:
    assert DEVICES
    assert (results.FOLDER / "SUMMARY.md").read_text().endswith(summary.fragment(results.FOLDER))


def test_the_committed_page_of_performance_is_what_the_files_make() -> None:
    page = performance.page(figures.Stored())
    assert performance.PAGE.read_text() == page, "run python -m benchmarks --report"
    # Every figure is shown, and the README's own two are there.
    shown = set(re.findall(r"!\[[^\]]+\]\(figures/([a-z0-9-]+)\.svg\)", page))
    assert shown | {"speed-light", "speed-dark"} == figures.drawn(figures.Stored()).keys()
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert [link for link in links if link.startswith("..") and not (performance.PAGE.parent / link).exists()] == []


def test_the_page_of_performance_says_where_others_are_faster() -> None:
    page = performance.PAGE.read_text()
    slower = page.split("## Where other code is faster")[1].split("And where ours is faster")[0]
    for device in DEVICES:
        rows = results.read(device)
        our_own = {row.provider for row in rows if row.role == "yardstick"}
        for found in rows:
            if found.provider in ("ccu_fast", "ccu_fast_bf16"):
                for peer, ratio in found.speedup_over.items():
                    if ratio < 1 and peer not in our_own:
                        assert f"| {peer} | {ratio:.2f} | " in slower, (device.name, found.op, peer)
    assert "0.63" in slower and "eager_compiled | 0.78" in slower


def every_figure() -> dict[str, tuple[str, str]]:
    """All that docs and pages show: what the committed files make of each, and the command."""
    losses, costs, sizes = (
        json.loads(path.read_text())
        for path in (figure.RESULTS, protection.PAGE.with_name("pictograms.json"), scale.RESULTS)
    )
    made = (
        ({f"{name}.svg": text for name, text in figures.drawn(figures.Stored()).items()}, "--report"),
        (figure.pictures(losses), ".unlearning.figure --page"),
        (frontier.pictures(costs, "pictograms"), ".protection --page"),
        (scale_page.pictures(sizes), ".protection.scale --plot"),
    )
    return {name: (text, command) for pictures, command in made for name, text in pictures.items()}


def test_the_committed_figures_are_what_the_files_make() -> None:
    figures_of_pages = every_figure()
    assert {path.name for path in charts.FIGURES.iterdir()} == figures_of_pages.keys()
    for name, (text, command) in figures_of_pages.items():
        assert (charts.FIGURES / name).read_text() == text, f"{name}: run python -m benchmarks{command}"


def test_the_committed_figures_are_small_and_can_be_read_anywhere() -> None:
    for name, (text, _) in every_figure().items():
        assert len(text) < 15_000, name
        picture = ElementTree.fromstring(text)
        assert picture.get("role") == "img" and picture.findtext(f"{SVG}title"), name
        # Nothing is drawn outside, and text can be read on a phone, where the picture is 400 pixels wide.
        width, height = float(picture.get("width", "")), float(picture.get("height", ""))
        for said in picture.iter(f"{SVG}text"):
            assert 0 <= float(said.get("x", "")) <= width and 0 < float(said.get("y", "")) < height, name
        assert charts.TEXT * 400 / width >= 11
        both = "prefers-color-scheme:dark" in text
        scheme = name.removesuffix(".svg").removeprefix("speed-")
        assert both == (scheme not in charts.SCHEMES) and (both or charts.SCHEMES[scheme][0] in text), name


def test_what_the_figures_are_said_to_show_is_so() -> None:
    stored = figures.Stored()
    fp32 = dict(stored.curve("clip_loss", "ccu_fast", "open_clip"))
    for other in ("one_gemm", "one_gemm_compiled"):
        assert all(fp32[size] > speed for size, speed in stored.curve("clip_loss", other, "open_clip"))
    assert min(fp32.values()) > 1
    bf16 = dict(stored.curve("clip_loss", "ccu_fast_bf16", "open_clip"))
    assert bf16.pop(128) < 1
    for other in ("open_clip_autocast", "open_clip_medium"):
        assert all(bf16[size] > speed for size, speed in stored.curve("clip_loss", other, "open_clip") if size > 128)
    assert stored.memory("clip_loss", "open_clip", B=8192) > 3
    assert stored.memory("clip_loss", "open_clip", "ccu_fast_64mib", B=8192) > 10
    assert stored.memory("clip_loss", "open_clip", "ccu_fast_64mib", B=16384) > 30
    assert all(stored.memory("clip_loss", "open_clip", "one_gemm_compiled", B=b) >= 2 for b in (128, 1024, 2048, 8192))
    small = {name: figures.small_rows(stored, name, 1) for name in ("fp32", "bf16")}
    assert all(1.8 < found["ClipLoss over open_clip"] < 2.2 for found in small["fp32"])
    assert all(0.9 < found["ClipLoss over one product"] < 1.1 for found in small["fp32"])
    assert round(max(found["ClipLoss over open_clip"] for found in small["bf16"])) == 42
    for _, op, shape in figures.KEY_BANKS:
        assert 1.4 < stored.speed(op, "eager", **shape) < 4.2
        large = op == "ccu_objective"
        assert (stored.memory(op, "eager", **shape) > 35) == (stored.memory(op, "eager_compiled", **shape) > 1) == large
    for rows in (5, 64, 2560):
        others = [stored.speed("topk_flips", name, N=rows) for name in ("nanogcg", "naive", "mem_reference")]
        assert min(others) > 2.55 and max(others) < 3.45 and 7.5 < stored.speed("topk_flips", "faiss", N=rows) < 15.5
    torchs, *ours = [errors["100"] for errors in stored.exact.values()]
    assert max(torchs) >= 1 and max(map(max, ours)) < 1e-5


def test_the_page_of_protection_has_the_costs_of_their_file() -> None:
    page = (REPOSITORY / "docs" / "results_protection.md").read_text()
    stored = json.loads((REPOSITORY / "benchmarks" / "protection" / "phases.json").read_text())
    ours, compat = stored["speedup"]["default"], stored["speedup"]["compat"]
    assert (
        f"a trigger pass takes {compat['triggers']:.1f} times less CPU time, a PGD step {compat['PGD step']:.1f}"
        in page
    )
    assert f"takes {ours['round with triggers']:.2f} times less" in page
    assert f"own decisions (aim: 6.5), {ours['round without triggers']:.2f} times less without" in page
    assert f"{stored['peak_mb']['default'] / stored['peak_mb']['before']:.2f}".lstrip("0") in page


def test_the_committed_page_of_unlearning_is_what_its_files_make() -> None:
    stored = json.loads(unlearning.RESULTS.read_text())
    found = by_seed(stored)
    assert in_rows(found) == stored
    assert unlearning.page(found) == unlearning.PAGE.read_text()
    front = unlearning.FRONT.read_text()
    assert splice(front, winners.front(found["unlearn"]), unlearning.BEGIN, unlearning.END) == front


def test_the_manual_shows_the_figures_of_ccu_s_losses() -> None:
    stored = json.loads(figure.RESULTS.read_text())
    manual = (REPOSITORY / "docs" / "unlearn.md").read_text()
    for name in figure.pictures(stored):
        assert f"](figures/{name})" in manual
    for share in stored["own place is the nearest"].values():
        assert f"{100 * share:.0f} %" in manual


def test_the_committed_figure_of_ccu_s_losses_shows_what_the_manual_says() -> None:
    stored = json.loads(figure.RESULTS.read_text())
    odds, gone, other, place = stored["curves"].values()
    assert max(map(len, stored["curves"].values())) <= 5
    middle = figure.POINTS // 2

    def apart(curves: dict[str, list[float]], one: str, two: str) -> float:
        return abs(curves[one][middle] - curves[two][middle])

    # In the middle the forgotten instances are where the unseen ones are, and were where the retained ones were.
    assert apart(odds, "forgotten, after", "unseen, after: the levels") < 0.1
    assert apart(odds, "forgotten, before", "retained, before") < 0.1
    assert apart(odds, "forgotten, before", "forgotten, after") > 0.3
    assert max(gone["forgotten, after"] + gone["unseen of the class, after"]) < -2 < 2 < gone["retained, after"][middle]
    assert stored["same to the bit"]["ccu"] and set(other["exact"]) == {0}
    assert not stored["same to the bit"]["trained, held by (b)"]
    held, free = other["trained, held by (b)"], other["trained, without (b)"]
    assert min(held) > 0 and all(x <= y for x, y in zip(held, free, strict=True)) and free[-2] > 2 * held[-2]
    assert all(place["with (c)"][i] > place["without (c)"][i] for i in range(middle))


def unlearned(seed: float, **visual: float) -> dict[str, Any]:
    """A seed's results: the accuracy of forgotten items by method, gold's being .5; CCU needs a fourth of the time."""
    measured = {"gold_mask": 0.5, **visual}
    return {
        "metrics": {
            name: {
                "visual": {"forget_train": value + seed, "retain_test": 0.75},
                "mia_auc": 0.5,
                "average_gap": 100 * abs(value - 0.5) / 3,
            }
            for name, value in measured.items()
        },
        "cost": {name: {"ratio": 0.25} for name in measured},
    }


def test_who_wins_is_said_plainly() -> None:
    methods = {"original": 1.0, "scrub": 0.53, "salun": 0.8, "ccu": 0.44, "ccu_without_a": 0.47, "salun, told": 0.515}
    results = {"a task": {"instances": {"0": unlearned(0.0, **methods), "1": unlearned(0.25, **methods)}}}
    text = winners.lines(results)
    row = text[4].split(" | ")
    assert row[0] == "| a task, instances" and row[-1] == "0.25 ± 0.00 |"
    assert row[1] == "SalUn, told 0.50 ± 0.00; SCRUB 1.00 ± 0.00; CCU 2.00 ± 0.00"
    assert row[2] == "3 of 4: 2.00 ± 0.00" and row[4] == "3 of 4: −6.0 visual U train"
    assert row[3].startswith("SalUn, told +1.5 visual U train; SCRUB +3.0 visual U train; ")
    assert text[8] == (
        "- a task, instances, by average gap: SalUn, told (0.50 ± 0.00), SCRUB (1.00 ± 0.00) before CCU (2.00 ± 0.00)."
    )
    assert "- a task, instances: CCU without (a) (1.00 ± 0.00); CCU 2.00 ± 0.00." in text
    assert text[-3:] == ["| task | without (a) |", "|---|---|", "| a task, instances | – |"]
    front = winners.front(results).splitlines()[4].split(" | ")
    assert (
        "CCU has a smaller average gap than the best baseline in 0 of 1 rows, and a smaller worst gap in 0."
        in winners.front(results)
    )
    assert front[0] == "| a task, instances" and front[2] == "–"
    assert front[3] == "**0.50 ± 0.00 (SalUn, told, 0.25 ± 0.00)**" and front[4] == "2.00 ± 0.00 (0.25 ± 0.00)"
    assert front[5:] == ["**1.5 (SalUn, told)**", "6.0 |"]
    alone = winners.lines({"a task": {"class": {"0": unlearned(0.0, ccu=0.5, salun=0.8)}}})
    assert alone[-1] == "No baseline is before CCU on any task."
    assert winners.lines({"a task": {"class": {"0": unlearned(0.0, salun=0.8)}}})[-1] == alone[-1]


def test_what_a_part_is_there_for_is_the_figure_that_suffers_most_without_it() -> None:
    of_class = {"0": unlearned(0.0, scrub=0.8, ccu=0.44, ccu_without_a=0.25, ccu_without_damage=0.54)}
    of_instances = {seed: unlearned(0.0, scrub=0.8, ccu=0.44, ccu_without_b=0.6) for seed in "01"}
    results = {"a task": {"class": of_class, "instances": of_instances}}
    of_class["0"]["metrics"]["ccu_without_a"]["mia_auc"] = 0.3
    assert "chosen after the fact" in winners.lines(results)[-8]
    assert winners.lines(results)[-4:] == [
        "| task | without (a) | without dampening | without (b) |",
        "|---|---|---|---|",
        "| a task, class | 20.0 MIA AUC | – |  |",
        "| a task, instances |  |  | 4.0 visual U train |",
    ]
    # Another retraining says how much is chance.
    again = {seed: unlearned(0.0, gold_again=0.47, ccu=0.44, ccu_without_b=0.6) for seed in "01"}
    assert winners.lines({"a task": {"class": of_class, "instances": again}})[-4:] == [
        "| task | without (a) | without dampening | without (b) | retrained, another seed |",
        "|---|---|---|---|---|",
        "| a task, class | 20.0 MIA AUC | – |  |  |",
        "| a task, instances |  |  | 4.0 visual U train | 3.0 visual U train |",
    ]
    assert winners.front(results).splitlines()[-1] == "Seeds: 2; a task, class 1."
    of_class["1"] = of_class["0"]
    assert winners.front({**results, "another": {"class": {"0": of_class["0"]}}}).splitlines()[-1] == (
        "Seeds: 2; another 1."
    )


def test_tables_of_unlearning_lead_with_what_moved() -> None:
    part = unlearned(0.0, salun=0.75, original=1.0)
    setting = {"task": "a task", "scenario": "instances", "forget_class": None}
    part["setting"] = {**setting, "forget_items": 100, "retain_items": 900, "test_items": 50}
    for found, cost in zip(part["metrics"].values(), part["cost"].values(), strict=True):
        found |= {"other": {"forget_train": 1.0, "retain_test": 1.0}, "fused": {"retain_test": 1.0}}
        for modality in ("visual", "other", "fused"):
            found[modality] = {"forget_test": None, "retain_train": 1.0, "forget_train": 1.0} | found[modality]
        cost["cpu_seconds"] = 1.0
    moved, stayed = unlearn_tables("instances", {"0": part})
    # What the rest is read against comes first.
    assert [row[0] for row in moved.rows] == ["before unlearning", "retrained, visual hidden", "SalUn"]
    assert moved.columns[1:4] == ["visual U train", "MIA AUC", "worst gap"] and moved.columns[-1] == "verdict"
    assert moved.rows[1][1:4] == ["0.500", "0.500", "–"]
    assert moved.rows[2][1:4] == ["0.750 (+25.0)", "0.500 (0.0)", "+25.0 visual U train"]
    assert moved.rows[2][-1].startswith("ineffective: still knows what it should forget: visual accuracy")
    assert "visual U test" not in stayed.columns and "visual R train" in stayed.columns
    brief = unlearn_tables("instances", {"0": part}, brief=True)[0]
    assert brief.rows[2][1:4] == [".750", ".500", "+25.0 vis. U"] and brief.rows[2][-1] == "ineffective"


def test_views_of_one_thing_count_once() -> None:
    setting = {"scenario": "class", "forget_items": 100, "retain_items": 900, "test_items": 50}
    sizes = {"forget_train": 10, "forget_test": 2, "retain_train": 90, "retain_test": 20}
    old = {"forget_train": 100, "forget_test": 5, "retain_train": 900, "retain_test": 45}
    assert independent({"0": {"setting": setting}}) == old
    both = {"0": {"setting": {**setting, "sizes": sizes}}, "1": {"setting": {**setting, "sizes": sizes}}}
    assert independent(both) == {name: 2 * count for name, count in sizes.items()}


def test_the_committed_page_of_protection_is_what_its_files_make() -> None:
    assert protection.page() == protection.PAGE.read_text()
    front = protection.FRONT.read_text()
    assert splice(front, protection.fragment(), protection.BEGIN, protection.END) == front
    manual = protection.MANUAL.read_text()
    assert splice(manual, protection.strengths(), protection.BEGIN, protection.END) == manual
    assert protection.BEGIN in front and protection.BEGIN in manual


def test_a_strength_is_a_row_and_a_variant_has_its_settings() -> None:
    study = protection.STUDIES["pictograms"]
    assert study.of("mem-8")[1] == study.settings
    method, settings = study.of("mem-12, words among, eps 16")
    assert (method, settings.place, settings.eps) == ("mem-12", "among", 16)
    assert study.of("mem-3, searched words") == ("mem-3", study.searched)
    with pytest.raises(ValueError, match="words in the middle"):
        study.of("mem-3, words in the middle")


def test_what_is_left_of_a_method_is_the_mean_of_seeds_and_directions() -> None:
    def part(i2t: float, t2i: float) -> dict[str, Any]:
        return {"best": {"i2t_r1": i2t, "t2i_r1": t2i}}

    parts = {"a/0": part(0.1, 0.2), "a/1": part(0.3, 0.4), "a/0/blur": part(0.5, 0.7), "a, eps 4/0": part(1.0, 1.0)}
    assert frontier.left(parts, "a") == pytest.approx(0.25)
    assert frontier.left(parts, "a", "blur") == pytest.approx(0.6)
    assert frontier.left(parts, "a", "crop") is None


def test_the_committed_page_of_sets_of_any_size_is_what_its_file_makes() -> None:
    stored = json.loads(scale.RESULTS.read_text())
    assert stored["gate"]["same"] and len(stored["killed"]["kills"]) == 10
    assert scale_page.page(stored) == scale.PAGE.read_text()


def test_the_committed_page_of_surrogates_is_what_its_file_makes() -> None:
    stored = json.loads(surrogates.RESULTS.read_text())
    assert stored["models"].keys() == surrogates.SHAPES.keys()
    assert surrogates.page(stored) == surrogates.PAGE.read_text()


def test_the_committed_page_of_patches_is_what_its_file_makes() -> None:
    assert compat.table(json.loads(compat.RESULTS.read_text())) == compat.TABLE.read_text()


def test_the_table_of_errors_is_what_its_file_makes() -> None:
    results = json.loads(exactness.RESULTS.read_text())
    assert {"torch", "native", "native, large batches", "reference", "triton"} <= results.keys()
    table = exactness.table(results)
    assert table in (REPOSITORY / "docs" / "numerics.md").read_text(), (
        "replace the table by that of python -m benchmarks.exactness"
    )
    for size in ("1", "10", "100"):
        ours = [errors[size] for provider, errors in results.items() if provider != exactness.EAGER]
        assert max(map(max, ours)) <= 1e-5


def test_every_committed_file_of_figures_has_a_row_a_line() -> None:
    folder = REPOSITORY / "benchmarks"
    depths = {path: depth for pattern, depth in DEPTHS.items() for path in folder.glob(pattern)}
    assert depths.keys() | {bars.FILE} == set(folder.rglob("*.json"))
    for path, depth in depths.items():
        assert path.read_text() == results.text(json.loads(path.read_text()), depth), path


def test_the_table_of_variants_is_that_of_its_figures() -> None:
    page = variants.PAGE.read_text()
    assert page.split(variants.BEGIN)[1].split(variants.END)[0].strip() == variants.table()


def test_every_file_that_facts_names_exists() -> None:
    page = REPOSITORY / "benchmarks" / "FACTS.md"
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert len(links) > 5
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []
