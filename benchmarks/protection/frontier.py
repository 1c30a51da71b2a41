"""What protection costs and brings: CPU time a picture, retrieval that is left, by method, words and ε."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.drawing import GREY, figure_of, save
from ccu_fast.mem import Method, Settings, protect
from ccu_fast.mem.study import Task

# The lines of the right plot: a method at several ε.
LINES = ("em", "text-noise", "mem-8")


def cost(make: Callable[[], Task], method: str, settings: Settings) -> float:
    """CPU milliseconds a picture of the generator, from pictures in memory to pictures in memory."""
    task = make()
    begun = time.process_time()
    surrogate = task.factory()
    made = protect(
        task.images, task.captions, task.tokenizer, surrogate, method=Method.parse(method), settings=settings
    )
    return 1000 * (time.process_time() - begun) / len(made.captions)


def table(costs: dict[str, float]) -> str:
    """The costs, in Markdown."""
    lines = ["| method | CPU ms a picture |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value:.2f} |" for name, value in costs.items()])


def left(parts: dict[str, Any], method: str, victim: str = "") -> float | None:
    """R@1 of the best epoch, the mean of both directions and of all seeds; None where there is no such victim."""
    best = [part["best"] for name, part in parts.items() if split(name) == (method, victim)]
    return mean((value["i2t_r1"] + value["t2i_r1"]) / 2 for value in best) if best else None


def split(name: str) -> tuple[str, str]:
    """The method and the victim of a stored part, METHOD/SEED or METHOD/SEED/VICTIM; "" for one like the surrogate."""
    method, _, *victim = name.split("/")
    return method, "".join(victim)


def draw(stored: dict[str, Any], path: Path) -> None:
    """R@1 over the cost, and over ε; nothing without matplotlib."""
    parts, costs = stored["parts"], stored["costs"]
    with figure_of(path) as figure:
        if figure is None:
            return
        by_cost, by_eps = figure.subplots(1, 2, sharey=True)
        clean = left(parts, "clean")
        chance = next(part["guessing"]["r1"] for part in parts.values() if "guessing" in part)
        names = [name for name in costs if left(parts, name) is not None]
        by_cost.scatter([costs[name] for name in names], [left(parts, name) for name in names], s=16, color="#3b7dd8")
        middle = sorted(costs[name] for name in names)[len(names) // 2]
        for i, name in enumerate(names):  # to the side where there is room, and in turn above and below
            side, up = ("left", 4) if costs[name] <= middle else ("right", -4), 4 if i % 2 else -10
            by_cost.annotate(
                name,
                (costs[name], left(parts, name)),
                (side[1], up),
                textcoords="offset points",
                fontsize=7,
                ha=side[0],
            )
        by_cost.set(xscale="log", xlabel="CPU ms a picture", ylabel="R@1 of the victim's best epoch")
        own = stored["setting"]["settings"]["eps"]
        for method in LINES:
            points = dict(_by_eps(parts, method, own))
            by_eps.plot(sorted(points), [points[eps] for eps in sorted(points)], "o-", markersize=4, label=method)
        by_eps.set(xlabel="ε, in 1/255", yscale="log")
        for axes in (by_cost, by_eps):
            axes.axhline(clean, linestyle="--", color=GREY, linewidth=1)
            axes.axhline(chance, linestyle=":", color=GREY, linewidth=1)
            axes.grid(alpha=0.3)
        by_eps.annotate("clean pairs", (1, clean), (-2, 3), ("axes fraction", "data"), "offset points", ha="right")
        by_eps.annotate("guessing", (1, chance), (-2, 3), ("axes fraction", "data"), "offset points", ha="right")
        by_eps.legend(fontsize=7, frameon=False)
        save(figure, path)


def _by_eps(parts: dict[str, Any], method: str, own: int) -> Iterable[tuple[int, float]]:
    for name in dict.fromkeys(split(key)[0] for key in parts):
        plain, _, eps = name.partition(", eps ")
        value = left(parts, name)
        if plain == method and value is not None:
            yield int(eps or own), value
