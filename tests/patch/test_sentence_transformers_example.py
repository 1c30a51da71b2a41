"""docs/examples/finetune_sentence_transformers.py with the library's trainer, which needs two more packages."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

from ccu_fast import patch
from tests.support.drop_in import library, require
from tests.support.paths import ROOT


def test_two_trainings_have_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = library("sentence_transformers")
    if importlib.util.find_spec("sentence_transformers.sentence_transformer") is None:
        pytest.skip(f"the example needs sentence-transformers 6, this is {module.__version__}")
    require("accelerate")
    require("datasets")
    monkeypatch.chdir(tmp_path)
    space = runpy.run_path(str(ROOT / "docs" / "examples" / "finetune_sentence_transformers.py"))
    calls: list[int] = []
    patched = importlib.import_module("ccu_fast.patch.sentence_transformers")
    fused = patched.info_nce
    monkeypatch.setattr(patched, "info_nce", lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs))
    found = space["main"](["--small"])
    assert len(found["plain"]) == len(found["patched"]) == 14
    assert found["patched"] == pytest.approx(found["plain"], rel=1e-4)
    assert found["patched"][-1] < 0.9 * found["patched"][0]
    assert len(calls) == 15  # and one batch before
    assert "sentence_transformers" not in patch.active()
