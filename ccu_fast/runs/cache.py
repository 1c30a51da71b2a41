"""Finished parts of long work, a JSON file each, so that a killed run goes on where it stopped.

A part is valid only under its key, which is made of what decides its figures: the settings, the versions that computed
it, and a FORMAT number beside the code, which is raised when that code gives other figures. The source text is not in
the key, so a changed comment or a moved file invalidates nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ccu_fast.files import write_whole


def part(path: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The part from its file, if that has this key; else computed and written, all of it or nothing.

    Args:
        path: of the file; its folder is made if needed. A damaged or foreign file is replaced.
        key: a hash of the FORMAT numbers of all code that the figures depend on, of the versions and of the settings.
        compute: the part, of JSON values and NumPy arrays.

    Returns:
        JSON values.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if isinstance(stored, dict) and stored.get("key") == key and isinstance(stored.get("value"), dict):
        return dict(stored["value"])
    # Through JSON also when fresh, so that a resumed result cannot differ from an uninterrupted one.
    text = json.dumps({"key": key, "value": compute()}, default=_plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return dict(json.loads(text)["value"])


def without(value: Any, *names: str) -> Any:
    """JSON values without what stands under these names, at any depth: the figures alone, no pictures."""
    if isinstance(value, dict):
        return {name: without(item, *names) for name, item in value.items() if name not in names}
    return [without(item, *names) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"not JSON: {type(value).__name__}")
