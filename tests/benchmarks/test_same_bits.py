"""benchmarks/same_bits.py tells what changed between two checkouts."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from benchmarks import same_bits


def test_what_differs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = list(itertools.islice(same_bits.cases(), 4))
    monkeypatch.setattr(same_bits, "cases", lambda: iter(cases))
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    monkeypatch.setattr(sys, "argv", ["same_bits.py", old])
    assert same_bits.main() == 0
    monkeypatch.setattr(sys, "argv", ["same_bits.py", new, "--against", old])
    assert same_bits.main() == 0 and "0 differ" in capsys.readouterr().out
    taken = json.loads(Path(old).read_text())
    Path(old).write_text(json.dumps({**taken, cases[2][0]: "other bits"}))
    assert same_bits.main() == 1 and f"1 differ from {old}\n{cases[2][0]}\n" in capsys.readouterr().out
