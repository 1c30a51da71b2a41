"""open_clip's own loss.py, the oracle of ClipLoss and SigLipLoss."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from tests.support.presence import absent


@functools.cache
def _load() -> ModuleType | None:
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return None
    # By file: importing open_clip itself needs torchvision.
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss_py", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip_loss() -> ModuleType:
    module = _load()
    if module is None:
        absent("open_clip_torch", "not installed (pip install --no-deps open_clip_torch)")
    assert module is not None
    return module
