"""The pytest plugin of :mod:`benchmarks.compat.suites`: applies a patch and records what becomes of each test.

CCU_FAST_SUITE holds its settings as JSON: the target, whether it is patched, and the file to write.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ccu_fast import patch

_found: dict[str, Any] = {"outcomes": {}, "ours": 0, "theirs": 0}
_settings: dict[str, Any] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Import the library of this environment before the tests look for one, and patch it."""
    _settings.update(json.loads(os.environ["CCU_FAST_SUITE"]))
    target = _settings["target"]
    if target == "open_clip":
        _do_without_torchvision()
    _found["version"] = importlib.import_module(str(patch.TARGETS[target].package)).__version__
    if _settings["patched"] and not patch.apply(target):
        raise pytest.UsageError(f"{target}: nothing was replaced")


def _do_without_torchvision() -> None:
    """As our own tests do; by file, because the tests that run are in a package ``tests`` too."""
    path = Path(__file__).parents[2] / "tests" / "support" / "torchvision_stub.py"
    spec = importlib.util.spec_from_file_location("torchvision_stub", path)
    assert spec is not None and spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    stub.install()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The worst of setup, call and teardown; that of setup is an error, as pytest calls it."""
    outcomes = _found["outcomes"]
    if report.failed:
        outcomes[report.nodeid] = "failed" if report.when == "call" else "error"
    elif report.skipped or report.when == "call":
        outcomes.setdefault(report.nodeid, report.outcome)


def pytest_sessionfinish() -> None:
    """Write what was found."""
    for call in patch.calls().get(_settings["target"], {}).values():
        _found["ours"] += call.ours
        _found["theirs"] += call.theirs
    Path(_settings["record"]).write_text(json.dumps(_found))
