"""What benchmarks say while they run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import benchmarks
from benchmarks.console import say_ends


def test_a_stage_is_told_where_it_begins_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    for done in range(4):
        say_ends("train", done, 3, "loss 1" if done else "")
    found = capsys.readouterr()
    assert found.err == "train 0/3\ntrain 3/3 loss 1\n" and not found.out


def test_there_is_one_printer() -> None:
    (root,) = benchmarks.__path__
    own = [str(file) for file in Path(root).rglob("*.py") if re.search(r"^def _?say", file.read_text(), re.MULTILINE)]
    assert [Path(file).name for file in own] == ["console.py"]
