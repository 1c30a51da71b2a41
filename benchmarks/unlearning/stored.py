"""The file of figures: parts and rows, and how what was measured anew goes into what is there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ccu_fast.unlearn.study.compare import best_baseline
from ccu_fast.unlearn.study.methods import METHODS
from ccu_fast.unlearn.study.run import ALWAYS
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS

DERIVED = ("gap_to_gold", "mia_gap", "worst_gap", "verdict")  # of a row: what follows from its figures and gold's
PART = ("task", "scenario", "seed")  # of a part's setting: what tells it from the others


def in_rows(results: dict[str, Any]) -> dict[str, Any]:
    """What is stored: a row for each method of each task, scenario and seed, and what its part has in common."""
    parts = _parts(results)
    rows = [
        {
            **{key: part["setting"][key] for key in PART},
            "method": method,
            "metrics": _measured(metrics),
            "cost": part["cost"][method],
        }
        for part in parts
        for method, metrics in part["metrics"].items()
    ]
    return {
        "versions": results["versions"],
        "seeds": results["seeds"],
        "parts": [{key: value for key, value in part.items() if key not in ("metrics", "cost")} for part in parts],
        "rows": rows,
    }


def by_seed(stored: dict[str, Any]) -> dict[str, Any]:
    """The same by task, scenario and seed again, as :func:`ccu_fast.unlearn.study.compare.compare` gives it."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    unlearn: dict[str, dict[str, dict[str, Any]]] = {}
    for part in stored["parts"]:
        task, scenario, seed = where = tuple(part["setting"][key] for key in PART)
        found[where] = {**part, "metrics": {}, "cost": {}}
        unlearn.setdefault(task, {}).setdefault(scenario, {})[str(seed)] = found[where]
    for row in stored["rows"]:
        for kind in ("metrics", "cost"):
            found[tuple(row[key] for key in PART)][kind][row["method"]] = row[kind]
    return {"versions": stored["versions"], "seeds": stored["seeds"], "unlearn": unlearn}


def merged(old: dict[str, Any], new: dict[str, Any], *, some_methods: bool = False) -> dict[str, Any]:
    """Both, where the new parts take the place of the old ones. Every part says which versions made it.

    Args:
        old, new: by task, scenario and seed, as :func:`by_seed` gives them.
        some_methods: whether the new parts are of some methods alone. The other methods' figures then stay if the
            original and the retrained model are measured as before; if not they go, being measured against others.
    """
    parts: dict[tuple[str, str, int], dict[str, Any]] = {}
    for results in (old, new):
        for part in _parts(results):
            where = tuple(part["setting"][key] for key in PART)
            part = {"versions": results["versions"], **part}
            parts[where] = _with_others(parts[where], part) if some_methods and where in parts else part
    tasks = [*TASKS, *sorted({task for task, _, _ in parts} - TASKS.keys())]
    unlearn: dict[str, dict[str, dict[str, Any]]] = {}
    for where in sorted(parts, key=lambda where: (tasks.index(where[0]), SCENARIOS.index(where[1]), where[2])):
        task, scenario, seed = where
        unlearn.setdefault(task, {}).setdefault(scenario, {})[str(seed)] = parts[where]
    return {"versions": new["versions"], "seeds": sorted({seed for _, _, seed in parts}), "unlearn": unlearn}


def _with_others(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new part with the figures of the methods that the old one has and the new one has not."""
    if any(_measured(old["metrics"].get(name, {})) != _measured(new["metrics"][name]) for name in ALWAYS):
        return new
    found = {}
    for kind in ("metrics", "cost"):
        both = {**old[kind], **new[kind]}
        found[kind] = {name: both[name] for name in METHODS if name in both}
    return {**new, **found, "best_baseline": best_baseline(found["metrics"])}


def _measured(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key not in DERIVED}


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """For a block that reads a file and replaces it: wait until no other process is in such a block in its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _parts(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        part for scenarios in results["unlearn"].values() for seeds in scenarios.values() for part in seeds.values()
    ]
