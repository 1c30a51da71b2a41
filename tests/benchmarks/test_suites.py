"""The comparison of a library's own tests without and with the patch, on a tiny suite made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compat import suites
from benchmarks.compat.suites import Suite, compare

TESTS = """
import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss

from ccu_fast import patch

x, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])

def test_passes():
    assert NTXentLoss()(x, labels).isfinite()

def test_is_handed_over():
    pairs = tuple(torch.tensor(i) for i in ([0, 2], [1, 3], [0, 1], [2, 2]))
    assert NTXentLoss()(x, labels, indices_tuple=pairs).isfinite()

def test_fails_with_the_patch():
    assert not patch.active()

def test_fails_without_the_patch():
    assert patch.active()

def test_fails():
    raise AssertionError

@pytest.mark.skip
def test_is_skipped():
    pass

def test_needs_what_is_not_there(missing):
    pass

def test_fails_at_the_end(request):
    request.addfinalizer(lambda: 1 / 0)
"""


def test_a_tiny_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytorch_metric_learning")
    folder = tmp_path / "tiny" / "tests"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "test_tiny.py").write_text(TESTS)
    suite = Suite("pytorch_metric_learning", "tiny", ("tests/test_tiny.py", "tests/test_of_another_version.py"))
    monkeypatch.setattr(suites, "SUITES", (suite,))
    monkeypatch.setattr(suites, "RESULTS", tmp_path / "suites.json")
    monkeypatch.setattr(suites, "TABLE", tmp_path / "SUITES.md")

    assert suites.main([str(tmp_path)]) == 1
    row = json.loads((tmp_path / "suites.json").read_text())["pytorch_metric_learning"]
    assert (row["passed without"], row["passed with"]) == (3, 3)
    assert row["worse"] == ["tests/test_tiny.py::test_fails_with_the_patch"]
    assert row["better"] == ["tests/test_tiny.py::test_fails_without_the_patch"]
    assert row["not passed without"] == {"error": 2, "failed": 2, "skipped": 1}
    assert (row["ours"], row["theirs"]) == (1, 1)
    table = (tmp_path / "SUITES.md").read_text()
    assert "| 3 | 3 | tests/test_tiny.py::test_fails_with_the_patch | 2 error, 2 failed, 1 skipped | 1 | 1 |" in table

    with pytest.raises(SystemExit):
        suites.main([str(tmp_path / "tiny")])
    assert f"folder: expected tiny in {tmp_path / 'tiny'}, got none" in capsys.readouterr().err


def test_tests_are_compared_one_by_one() -> None:
    """Equal numbers hide nothing, and a test that is gone is a test that does not pass."""
    without = {"a": "passed", "b": "passed", "c": "failed", "d": "passed", "e": "skipped"}
    those_with = {"a": "passed", "b": "skipped", "c": "passed", "e": "skipped"}
    assert compare(without, those_with) == {
        "passed without": 3,
        "passed with": 2,
        "not passed without": {"failed": 1, "skipped": 1},
        "worse": ["b", "d"],
        "better": ["c"],
    }
