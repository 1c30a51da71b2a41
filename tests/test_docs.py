"""README, CONTRIBUTING and docs: their code runs, their links lead somewhere.

build_support/docs/blocks.py has the conventions.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import bars, results
from build_support.docs.blocks import anchors, blocks, links, name_of, pages, prose
from ccu_fast import patch
from tests.support.page_run import Run, exists, of_the_tests
from tests.support.paths import ROOT
from tests.support.presence import absent

PAGES = {name_of(page): page for page in pages()}
SCHEMES = ("gh-light-mode-only", "gh-dark-mode-only")  # of a picture: GitHub and the site show the one that fits


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder; of what a page changes in this process nothing stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    precision, dtype, modules = torch.get_float32_matmul_precision(), torch.get_default_dtype(), set(sys.modules)
    yield tmp_path
    for target in patch.active():
        patch.revert(target)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.usefixtures("one_thread", "reader")
@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name: str) -> None:
    with Run(PAGES[name]) as run:
        for block in blocks(PAGES[name].read_text(encoding="utf-8")):
            try:
                run.block(block)
            except ModuleNotFoundError as error:
                if not of_the_tests(str(error.name)):
                    raise
                absent(str(error.name), "not installed")
            except BaseException as error:
                if sys.version_info >= (3, 11):
                    error.add_note(f"{name}, line {block.line}")
                raise
    run.done()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_something_and_its_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    text = page.read_text(encoding="utf-8")
    assert len(prose(text).split()) > 10, "an empty page"
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{link}: there is no such file"
        if anchor in SCHEMES:
            assert target.suffix == ".svg"
        elif anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link}: there is no such heading"


WRONG = {
    "an unknown language": "```fortran\nend\n```",
    "no language": "```\nend\n```",
    "an error": "```python\n1 / 0\n```",
    "another answer": "```python\n>>> 1 + 1\n3\n```",
    "no option": "```bash\nccu-fast info --no-such-option\n```",
    "no target": "```bash\nmake nothing\n```",
    "no extra": "```bash\npip install '.[nothing]'\n```",
    "nothing on PyPI": "```bash\npip install 'ccu-fast[apps]'\n```",
    "no file": "```bash\npython nothing.py\n```",
    "no TOML": "```toml\na = \n```",
    "no library": "<!-- needs: nothing -->\n```python\n1\n```",
    "no test": "<!-- run by: tests/test_docs.py::test_nothing -->\n```bash\nccu-fast info\n```",
    "a test of something else": "<!-- run by: tests/test_files.py::test_output_files -->\n```bash\nccu-fast demo\n```",
    "a file that nobody runs": "```python\n# a.py\nx = 1\n```",
    "a program that nobody knows": "```bash\nrm -r .\n```",
    "a block without an end": "```python\nx = 1\n",
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_in_a_page_fails(kind: str) -> None:
    with Run(ROOT / "README.md") as run, pytest.raises((AssertionError, ValueError, ZeroDivisionError)):
        for block in blocks(WRONG[kind]):
            run.block(block)
        run.done()


@pytest.mark.usefixtures("reader")
def test_what_is_right_in_a_page_runs() -> None:
    page = """
<!-- setup
import torch
-->
```python
x = torch.ones(3)
```
```python
>>> x.sum()
tensor(3.)
```
  ```python
  # made.py
  from pathlib import Path
  Path("written").write_text("x")
  ```
```bash
ccu-fast info --json && python made.py      # a comment
make test ARGS='tests/losses'
```
"""
    with Run(ROOT / "README.md") as run:
        for block in blocks(page):
            run.block(block)
    run.done()
    assert Path("written").read_text() == "x"
    assert exists("tests/test_docs.py::test_what_is_right_in_a_page_runs")
    assert exists("tests/cli/test_unlearn.py::TestCommand::test_a_class_by_its_name")
    assert not exists("tests/cli/test_unlearn.py::test_a_class_by_its_name")


def test_links_and_anchors_are_found() -> None:
    page = (
        '# One `two` (three)\n[a](b.md#c) `[no](code)` <img src="d.svg"> [e](https://f) ![g](h.png "i")\n'
        "[`l`](m)`[no](code)\n[no](code)` [n](<o>)\n```text\n[j](k)\n```"
    )
    assert links(page) == ["b.md#c", "d.svg", "h.png", "m", "o"]
    assert anchors(page) == {"one-two-three"}


def test_the_readme_is_short_and_says_first_what_it_is_and_how_to_try_it() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert "`make demo`" in text and "`make test`" in text
    assert text.index("<picture>") < text.index("There are no GPU figures") < text.index("## Install")


def test_the_readme_s_figures_are_those_of_a_committed_file() -> None:
    page = " ".join(PAGES["README.md"].read_text(encoding="utf-8").split())
    rows = results.read(results.FOLDER / "cpu-intel-r-xeon-r-processor-amx-bf16-2-threads")
    found = {row.provider: row for row in rows if row.op == "clip_loss" and row.shape == {"B": 8192, "D": 512}}
    seconds = {name: f"{(row.p50_ms or 0) / 1e3:.1f} s" for name, row in found.items()}
    megabytes = {name: f"{(row.peak_extra_bytes or 0) / 1e6:.0f} MB" for name, row in found.items()}
    ours, theirs = "ccu_fast", "open_clip"
    assert f"takes {seconds[ours]} instead of open_clip's {seconds[theirs]}, and {megabytes[ours]} instead of" in page
    assert f"instead of {megabytes[theirs]}; in bf16 {seconds['ccu_fast_bf16']} instead of" in page
    assert f"instead of {seconds['open_clip_autocast']} under autocast." in page
    # The picture's alternative text says what the picture does, here and on the start page of the site.
    (alt,) = re.findall(r'<img src="docs/figures/speed-light.svg" alt="(.*?)">', page)
    (title,) = re.findall(r"<title>(.*?)</title>", (ROOT / "docs/figures/speed-light.svg").read_text(encoding="utf-8"))
    assert re.findall(r"[\d.]+×", alt) == re.findall(r"[\d.]+×", title)
    start = PAGES["docs/index.md"].read_text(encoding="utf-8")
    shown = [(alt, f"figures/speed-{scheme}.svg#gh-{scheme}-mode-only") for scheme in ("light", "dark")]
    assert re.findall(r"!\[(.*?)\]\((.*?)\)", start) == shown
    assert start.index("![") < start.index("**There are no GPU figures yet:**") < start.index("## Install")


def test_the_comparison_says_what_the_packages_say_of_themselves() -> None:
    page = PAGES["docs/compare.md"].read_text(encoding="utf-8")
    rows = {row[0].split("]")[0].strip("| ["): "|".join(row) for row in table_rows(page)}
    pinned = dict(
        re.findall(r"'(open_clip_torch|memeff|siglip-kernel|inf_cl)==([\d.]+)'", (ROOT / "Makefile").read_text())
    )
    assert len(pinned) == 4
    for package, version in pinned.items():
        row = rows[package.removesuffix("_torch")]
        assert f") {version}," in row, f"{package} {version} is what the tests have: read it anew"
        try:
            facts = importlib.metadata.metadata(package)
        except importlib.metadata.PackageNotFoundError:
            absent(package, "not installed")
        assert facts["Version"] == version and facts["License"] in row
        assert f"Python {facts['Requires-Python'].removeprefix('>=')}" in row
    ours = importlib.metadata.metadata("ccu_fast")
    assert f"Python {ours['Requires-Python'].removeprefix('>=')}" in rows["ccu_fast"]


def table_rows(page: str) -> list[list[str]]:
    """The cells of the rows of a page's tables."""
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]


def test_the_limits_name_every_aim_of_a_cpu_that_was_not_reached() -> None:
    page = PAGES["docs/limits.md"].read_text(encoding="utf-8")
    missed = []
    for folder in sorted(results.FOLDER.glob("cpu-*")):
        rows = results.read(folder)
        for bar in bars.load():
            value = bar.measured(rows)
            if value is not None and not bar.met(value):
                missed.append((bar, value))
    assert missed
    for bar, value in missed:
        assert re.search(rf"^\|.*\| {bar.bar:g} \|.*\b{value:.2f} \(", page, re.MULTILINE), bar.said(value)


def test_the_limits_compare_bf16_with_bf16_too() -> None:
    page = " ".join(PAGES["docs/limits.md"].read_text(encoding="utf-8").split())
    (bar,) = (bar for bar in bars.load() if bar.device == "cpu" and bar.peer == "open_clip_autocast")
    found = {}
    for folder in sorted(results.FOLDER.glob("cpu-*")):
        value = bar.measured(results.read(folder))
        if value is not None:
            found[folder.name.split("-")[1]] = (f"{value:.2f}", bar.met(value))
    (amd, amd_met), (intel, intel_met) = found["amd"], found["intel"]
    assert f"the loss is {amd} (AMD) and {intel} (Intel) times as fast; the aim of {bar.bar:g}" in page
    assert amd_met and intel_met, "the page says that the aim is reached"
