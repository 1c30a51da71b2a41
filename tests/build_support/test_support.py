"""`make matrix`: its record, the table made from it, and the range that `ccu-fast info` names."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from build_support import support
from build_support.docs.generated import splice
from ccu_fast import info


def runs() -> list[dict[str, Any]]:
    return list(json.loads(support.RECORD.read_text())["runs"])


def test_the_page_shows_the_record() -> None:
    page = support.PAGE.read_text()
    assert splice(page, support.table(runs()), support.BEGIN, support.END) == page


@pytest.mark.parametrize("name", support.VERSIONS)
@pytest.mark.parametrize("end", [0, 1])
def test_the_range_that_is_said_to_be_tested_has_run_without_a_failure(name: str, end: int) -> None:
    clean = [run[name] for run in runs() if run["passed"] > 0 and not run["failed"]]
    version = info.TESTED[name][end]
    assert any(found == version or found.startswith(f"{version}.") for found in clean), clean


def test_every_run_has_the_parts_that_the_command_has() -> None:
    commands = {f"python -m pytest {part}" for part in support.PARTS}
    for run in runs():
        assert run["command"] in commands
        assert sum(run["why_skipped"].values()) == run["skipped"]


@pytest.mark.parametrize("file", ["test_ahead_of_time", "test_launch_path"])
def test_a_part_takes_the_triton_kernels_through_the_compiler_and_up_to_a_launch(file: str) -> None:
    """Nothing else that runs without a GPU does; --quick would leave them out."""
    path = f"tests/ops/triton/{file}.py"
    assert (support.ROOT / path).is_file()
    assert any(path in shlex.split(part) and "--quick" not in part for part in support.PARTS)


def test_what_is_recorded_as_compiled_is_compiled_by_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []

    def main(words: list[str], plugins: list[support.Tally]) -> int:
        caches.append(Path(os.environ["TRITON_CACHE_DIR"]))
        assert not any(caches[-1].iterdir())
        return 0

    monkeypatch.setattr(support, "kernels", dict)
    monkeypatch.setattr(pytest, "main", main)
    commands = [support.run_tests(shlex.split(part))["command"] for part in support.PARTS]
    assert commands == [f"python -m pytest {part}" for part in support.PARTS]
    assert len({*caches}) == len(caches) and not any(cache.exists() for cache in caches)


def test_a_run_is_counted_by_its_results(tmp_path: Path) -> None:
    """Of tests of every outcome, in a file of its own; the one that fails is named."""
    file = tmp_path / "test_made_up.py"
    file.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 0\n"
        "def test_left_out(): pytest.skip('no such thing')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_without_its_fixture(broken): pass\n"
        "@pytest.fixture\n"
        "def untidy(): yield; raise ValueError\n"
        "def test_not_cleaned_up(untidy): pass\n"
    )
    (tmp_path / "test_not_imported.py").write_text("import no_such_module_at_all\n")
    tally = support.Tally()
    words = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={tmp_path}", str(tmp_path)]
    assert pytest.main(words, plugins=[tally]) in support.RAN
    result = tally.result()
    assert (result["passed"], result["skipped"], result["why_skipped"]) == (1, 1, {"no such thing": 1})
    assert [name.split("::")[-1].split("/")[-1] for name in result["failed"]] == [
        "test_not_cleaned_up",
        "test_without_its_fixture",
        "test_wrong",
        "test_not_imported.py",
    ]


def test_what_is_published_names_no_folder_of_this_machine() -> None:
    assert support.public(f"{support.ROOT}/a\n  {sys.prefix}/b") == "./a <prefix>/b"
    text = support.RECORD.read_text()
    assert str(support.ROOT) not in text and str(Path.home()) not in text


def test_a_run_replaces_the_older_one_of_its_versions() -> None:
    def run(python: str, passed: int) -> dict[str, Any]:
        return {"python": python, "torch": "2.8.0", "triton": "3.4.0", "command": "c", "passed": passed}

    found = support.merged([run("3.10.1", 1), run("3.9.9", 2)], run("3.10.1", 3))
    assert [(r["python"], r["passed"]) for r in found] == [("3.10.1", 3), ("3.9.9", 2)]
