"""What is generated from stored figures: files, pages, plots, the README's table; are the committed ones current?."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import bars, host_time, mem_phases, plots, results, summary, tables, variants
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
from ccu_fast.cli.report.tables import independent, unlearn_tables

DEVICES = sorted(path for path in results.FOLDER.glob("*") if path.is_dir())
DEPTHS = {  # of every committed file of figures, as its command stores it
    "compat/results.json": 1,
    "compat/suites.json": 1,
    "distributed/results/*.json": distributed.DEPTH,
    "exactness/results.json": 2,
    "host/results/*.json": host_time.DEPTH,
    "in_turn.json": 1,
    "in_turn_large.json": 1,
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
    "visits/*/summary.json": 1,
    "visits/*/tune.json": 3,
}


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
    assert {p.name for p in (tmp_path / "cpu-a").iterdir()} == {"clip_loss.json", "README.md"}
    assert "python -m benchmarks --plots" in (tmp_path / "cpu-a" / "README.md").read_text()
    assert "4.00 open_clip" in (tmp_path / "SUMMARY.md").read_text()
    assert (REPOSITORY / "README.md").read_bytes() == readme  # only the project's own results go there


def test_plots_are_drawn_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["--plots", "--out", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().out
    measured(tmp_path / "cpu-a", sizes=1)
    assert main(["--plots", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'cpu-a' / 'clip_loss.svg'}\n"
    assert {p.name for p in (tmp_path / "cpu-a").iterdir()} == {"clip_loss.json", "clip_loss.svg"}


def test_without_matplotlib_the_plots_alone_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(tmp_path / "cpu-a", sizes=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert main(["--report", "--plots", "--out", str(tmp_path)]) == 1
    assert "cpu-a: matplotlib is not installed\nno plots\n" in capsys.readouterr().out
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


def test_the_committed_tables_are_what_the_files_make() -> None:
    assert DEVICES
    assert (results.FOLDER / "SUMMARY.md").read_text().endswith(summary.fragment(results.FOLDER))
    link = f"{results.FOLDER.relative_to(REPOSITORY)}/"
    for name in summary.PAGES:
        page = (REPOSITORY / name).read_text()
        assert summary.splice(page, summary.fragment(results.FOLDER, link)) == page, "run python -m benchmarks --report"


def test_the_committed_page_of_unlearning_is_what_its_files_make() -> None:
    stored = json.loads(unlearning.RESULTS.read_text())
    found = by_seed(stored)
    assert in_rows(found) == stored
    assert unlearning.page(found) == unlearning.PAGE.read_text()
    front = unlearning.FRONT.read_text()
    assert summary.splice(front, winners.front(found["unlearn"]), unlearning.BEGIN, unlearning.END) == front


def test_the_committed_figure_of_ccu_s_losses_is_what_its_file_makes(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    stored = json.loads(figure.RESULTS.read_text())
    figure.draw(stored, tmp_path / "losses.svg")
    committed, drawn = (ElementTree.parse(path).getroot() for path in (figure.FIGURE, tmp_path / "losses.svg"))
    said = [[text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")] for picture in (committed, drawn)]
    assert said[0] == said[1] and "forgotten, after" in said[0], "run python -m benchmarks.unlearning.figure --page"
    assert figure.digest(stored) in figure.FIGURE.read_text()
    if f"Matplotlib v{matplotlib.__version__}," in figure.FIGURE.read_text():  # others place lines a little differently
        assert figure.FIGURE.read_bytes() == (tmp_path / "losses.svg").read_bytes()
    manual = (REPOSITORY / "docs" / "unlearn.md").read_text()
    assert "](figures/losses.svg)" in manual
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
        "| task | without (a) | without dampening | without (b) | gold, another seed |",
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
    for figures, cost in zip(part["metrics"].values(), part["cost"].values(), strict=True):
        figures |= {"other": {"forget_train": 1.0, "retain_test": 1.0}, "fused": {"retain_test": 1.0}}
        for modality in ("visual", "other", "fused"):
            figures[modality] = {"forget_test": None, "retain_train": 1.0, "forget_train": 1.0} | figures[modality]
        cost["cpu_seconds"] = 1.0
    moved, stayed = unlearn_tables("instances", {"0": part})
    assert [row[0] for row in moved.rows] == ["original", "gold_mask", "salun"]  # what the rest is read against
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
    assert summary.splice(front, protection.fragment(), protection.BEGIN, protection.END) == front
    manual = protection.MANUAL.read_text()
    assert summary.splice(manual, protection.strengths(), protection.BEGIN, protection.END) == manual
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
