"""docs/unlearn.md: its commands run, and what it lists is what there is."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from build_support.docs.blocks import blocks
from ccu_fast.cli.main import main
from ccu_fast.cli.report import figures
from ccu_fast.unlearn.baselines import registry
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.study.methods import STARTED, TELLABLE, TOLD
from tests.support.page_run import commands
from tests.support.paths import ROOT
from tests.support.small_demo import quick_map

PAGE = (ROOT / "docs" / "unlearn.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.mark.usefixtures("one_thread")
def test_from_own_pairs_to_an_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "embedding_map", quick_map)
    lines: list[list[str]] = []
    for block in blocks(section("From own pairs to an audit")):
        if block.language == "bash":
            lines += commands(block.text)
        else:
            Path(str(block.file)).write_text(block.text)
    assert [words[0] for words in lines] == ["python", "ccu-fast", "ccu-fast"]
    told = ""
    try:
        for program, *words in lines:
            if program == "python":
                runpy.run_path(words[0], run_name="__main__")
                continue
            done = main(words)
            told, wrong = capsys.readouterr()
            assert done == 0, wrong
    finally:
        sys.modules.pop("my_digits", None)
    assert max(map(len, told.splitlines())) <= 80 and "worst gap" in told
    assert (tmp_path / "clean" / "model.safetensors").is_file() and (tmp_path / "audit" / "report.html").is_file()
    results = json.loads((tmp_path / "audit" / "results.json").read_text())
    value = results["unlearn"]["pairs.npz"]["class"]["0"]
    assert list(value["metrics"]) == ["original", "gold", "salun", "scrub", "scrub, told", "ccu"]
    ccu = value["metrics"]["ccu"]
    assert ccu["visual"]["forget_test"] < 0.1 < 0.9 < ccu["other"]["forget_train"]
    assert [path.name for path in (tmp_path / "audit" / "models").iterdir()] == ["retrained-seed0.safetensors"]


def test_the_baselines_are_listed_as_the_registry_has_them() -> None:
    rows = [line for line in section("The baselines by name").splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` | {b.label} | {b.does} | {b.source} |" for name, b in BASELINES.items()]


@pytest.mark.parametrize("name", BASELINES)
def test_the_source_of_a_baseline_is_the_one_its_own_module_names(name: str) -> None:
    folder = Path(registry.__file__).parent
    modules = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py") if path.name != "registry.py")
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", BASELINES[name].source)
    assert papers and all(f"(arXiv {paper})" in modules for paper in papers)


def test_a_method_that_may_be_told_is_one_that_needs_nothing_less() -> None:
    assert {name.removesuffix(TOLD) for name in STARTED if name.endswith(TOLD)} == set(TELLABLE) <= BASELINES.keys()
