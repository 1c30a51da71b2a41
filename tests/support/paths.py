"""The paths of this checkout and its tests; a child process finds both with ROOT on its path."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
