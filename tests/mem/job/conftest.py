"""Checkpoints of small runs."""

from __future__ import annotations

import pytest

from ccu_fast.mem.job import generation


@pytest.fixture(autouse=True)
def never_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is made wherever the work asks for one, whatever it costs: in small runs, after every batch."""
    monkeypatch.setattr(generation, "SOON", 0.0)
