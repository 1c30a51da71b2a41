"""``python -m benchmarks.mem_phases`` on small towers, with this checkout for the one before."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import mem_phases
from tests.support.paths import ROOT
from tests.support.presence import absent


def test_two_checkouts_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("transformers") is None:
        absent("transformers", "the package is not installed")
    sizes = {"layers": 1, "batch": 2, "triggers": 1, "candidates": 2, "pgd-steps": 2, "repeats": 1}
    small = [f"--{name}={size}" for name, size in sizes.items()]
    out = tmp_path / "phases.json"
    assert mem_phases.main([*small, "--before", str(ROOT), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["gate"].pop("noise that agrees") >= 0.99
    assert found["gate"] == {"triggers that agree": 1.0, "triggers as before": 1.0, "noise as before": 1.0}
    phases = {"triggers", "noise pass", "surrogate step", "round with triggers", "round without triggers"}
    for name in ("authors", "compat", "before", "default"):
        seconds = found["cpu_seconds"][name]
        assert seconds.keys() - {"PGD step"} == phases
        assert seconds["round without triggers"] == pytest.approx(seconds["noise pass"] + seconds["surrogate step"])
    assert found["speedup_over_before"].keys() == phases
    assert found["peak_mb"].keys() == {"before", "default"} and min(found["peak_mb"].values()) > 100
    assert "speedup_over_before" in capsys.readouterr().out


def test_ways_that_do_not_agree_give_no_time() -> None:
    mem_phases.check({"triggers as before": 0.96, "noise as before": 0.995})
    for gate in (
        {"triggers as before": 0.9, "noise as before": 1.0},
        {"triggers that agree": 1.0, "noise as before": 0.9},
    ):
        with pytest.raises(RuntimeError, match="do not agree"):
            mem_phases.check(gate)
