"""The site of docs/: what it lists is what there is. ``make docs`` builds it."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from build_support.docs import commands
from build_support.docs.blocks import links, prose
from build_support.docs.generated import splice, table_lines
from build_support.docs.markdown import from_docstring, from_notebook, from_page
from ccu_fast.cli import app
from tests.support.paths import ROOT
from tests.test_docstrings import MODULES

PAGES = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
# A name that is a module's too is listed by where it is defined, with the public name as its heading.
ENTRY = re.compile(r"^::: (\S+)\n(?:    options: { heading: (\S+), )?", re.MULTILINE)
ENTRIES = [entry for page in PAGES for entry in ENTRY.findall(page.read_text(encoding="utf-8"))]
LISTED = [heading or name for name, heading in ENTRIES]
PUBLIC = [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__]


def found(name: str) -> Any:
    """What a full name means."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_every_public_name_is_in_the_reference_once() -> None:
    assert len(PUBLIC) > 70
    assert {name: LISTED.count(name) for name in PUBLIC} == dict.fromkeys(PUBLIC, 1)


def test_no_name_is_listed_twice() -> None:
    assert sorted(LISTED) == sorted(set(LISTED))


def test_no_name_stands_for_a_module_that_it_hides() -> None:
    for name, heading in ENTRIES:
        path = ROOT / name.replace(".", "/")
        assert isinstance(found(heading or name), ModuleType) == (path.is_dir() or path.with_suffix(".py").is_file())


@pytest.mark.parametrize("name", LISTED)
def test_a_listed_name_is_there_and_documented(name: str) -> None:
    value = found(name)
    if inspect.isfunction(value) or inspect.isclass(value) or isinstance(value, ModuleType):
        assert inspect.getdoc(value)
    else:
        assert name in PUBLIC


def test_every_page_of_the_reference_is_in_the_navigation_and_the_index() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = set(links((ROOT / "docs/reference/api/index.md").read_text(encoding="utf-8")))
    for page in PAGES:
        assert f"reference/api/{page.name}" in navigation
        assert page.name == "index.md" or page.name in index


def test_the_command_reference_is_current() -> None:
    assert commands.PAGE.read_text(encoding="utf-8") == commands.page(), "run python -m build_support.docs.commands"


@pytest.mark.parametrize("columns", ["40", "300"])
def test_the_command_reference_is_the_same_at_any_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert commands.page() == commands.PAGE.read_text(encoding="utf-8")


def test_the_command_reference_has_the_options_that_typer_has() -> None:
    group: Any = typer.main.get_command(app.app)
    sections = dict(re.findall(r"^## ccu-fast (\S+)\n(.*?)(?=^## )", commands.page(), re.MULTILINE | re.DOTALL))
    assert sections.keys() == group.commands.keys()
    for name, command in group.commands.items():
        listed = re.findall(r"^\| `([^\s`]+)", sections[name], re.MULTILINE)
        assert listed == [p.name.upper() if p.param_type_name == "argument" else p.opts[0] for p in command.params]
    assert "| `--eps INT` | Largest change of a pixel, in 1/255. From 0 to 127. Default: `8`. |" in sections["protect"]


def test_a_docstring_becomes_markdown() -> None:
    text = "Sum of :func:`x.one`::\n\n    a = 1\n      + 2\n\n    b\n\nMore.\n\nSource: them.\n\n>>> f()\n1\n>>> g()\n2"
    assert from_docstring(text, lambda name: f"<{name}>") == (
        "Sum of <x.one>:\n\n```python\na = 1\n  + 2\n\nb\n```\n\nMore.\n\n**Source:** them.\n\n"
        "```pycon\n>>> f()\n1\n>>> g()\n2\n```"
    )


def test_the_sections_of_a_docstring_are_as_griffe_reads_them() -> None:
    text = (
        "Do.\n\nArgs:\n    a, b: > 0, of\n        c, d: e.\n\nReturns:\n    A dict: of x.\n\nRaises:\n    A, B: so.\n"
    )
    assert from_docstring(text, str, "dict") == (
        "Do.\n\nArgs:\n    a,\N{EN SPACE}b: \\> 0, of\n        c, d: e.\n\nReturns:\n    dict: A dict: of x.\n\n"
        "Raises:\n    A,\N{EN SPACE}B: so."
    )


def test_a_section_of_one_line_has_the_heading_of_a_section() -> None:
    text = "Do.\n\nArgs: as there.\n\nReturns: x.\n\nRaises: A.\n\nSource: them."
    assert from_docstring(text, str, "Tensor") == (
        "Do.\n\n**Parameters:** as there.\n\n**Returns:** x.\n\n**Raises:** A.\n\n**Source:** them."
    )


def test_no_docstring_of_the_reference_keeps_other_markup() -> None:
    for name in LISTED:
        value = found(name)
        texts = [inspect.getdoc(value) or ""]
        texts += [inspect.getdoc(v) or "" for v in vars(value).values()] if inspect.isclass(value) else []
        for text in texts:
            # An example outside a block of code is prose to Markdown: ["a"]["b"] in it is a link that leads nowhere.
            seen = prose(from_docstring(text, str))
            assert not re.search(r"::$|:\w+:`|^Source:|^ *>>>", seen, re.MULTILINE), name


def test_a_notebook_becomes_markdown() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "text": ["1\n"]},
                {"data": {"image/png": "QUJD\n", "text/plain": "f"}},
            ],
        },
    ]
    assert from_notebook({"cells": cells}) == (
        "# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n![output](data:image/png;base64,QUJD)\n"
    )


def test_a_table_has_its_last_columns_on_the_right() -> None:
    assert table_lines(("a", "b", "c"), [("x", 1, 2.5)], right=1) == [
        "| a | b | c |",
        "|---|---|--:|",
        "| x | 1 | 2.5 |",
    ]


def test_a_page_gets_a_text_between_its_marks_and_nowhere_else() -> None:
    page = "before\n<!-- a -->\nold\n<!-- b -->\nafter\n"
    spliced = splice(page, "new\n", "<!-- a -->", "<!-- b -->")
    assert spliced == "before\n<!-- a -->\n\nnew\n\n<!-- b -->\nafter\n"
    assert splice(spliced, "new", "<!-- a -->", "<!-- b -->") == spliced
    for lacking in ("no marks\n", "<!-- a -->", "<!-- b --> <!-- a -->"):
        with pytest.raises(ValueError, match="page: expected the line"):
            splice(lacking, "text", "<!-- a -->", "<!-- b -->")


def test_a_page_loses_what_only_tests_read_and_its_links_move() -> None:
    read = "<!-- setup\nx = 1\n\n-->\n<!-- run by: a::b -->\n"
    kept = (
        "See [a]({}), `[b](b)` and `<!-- setup -->`.\n\n```{}\n>>> f[0](../b)\n```\n\n<!-- k -->\n[c]({})\n\n"
        "<img alt='' src=\"{}\">\n"
    )
    text = read + kept.format("../a.py", "python", "c.md#d", "e.svg")
    assert from_page(text, str.upper) == kept.format("../A.PY", "pycon", "C.MD#D", "E.SVG")
    assert links(text) == ["../a.py", "c.md#d", "e.svg"]


def test_the_environment_of_the_site_is_pinned_to_ranges() -> None:
    lines = Path(ROOT / "docs" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line.partition("#")[0].strip() for line in lines]
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+(,<[\d.]+)?(; python_version .*)?", name) for name in filter(None, names))
