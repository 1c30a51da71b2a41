"""What protection costs and brings: CPU time a picture, retrieval that is left, by method, words and ε."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any

from benchmarks.charts import Bar, Group, Line, Scale, bars, lines, powers
from build_support.docs.generated import table_lines
from ccu_fast.mem import Method, Settings, protect
from ccu_fast.mem.study import Task

# The lines of the plot over ε.
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
    rows = [[name, f"{value:.2f}"] for name, value in costs.items()]
    return "\n".join(table_lines(("method", "CPU ms a picture"), rows))


def left(parts: dict[str, Any], method: str, victim: str = "") -> float | None:
    """R@1 of the best epoch, the mean of both directions and of all seeds; None where there is no such victim."""
    best = [part["best"] for name, part in parts.items() if split(name) == (method, victim)]
    return mean((value["i2t_r1"] + value["t2i_r1"]) / 2 for value in best) if best else None


def split(name: str) -> tuple[str, str]:
    """The method and the victim of a stored part, METHOD/SEED or METHOD/SEED/VICTIM; "" for one like the surrogate."""
    method, _, *victim = name.split("/")
    return method, "".join(victim)


def pictures(stored: dict[str, Any], task: str) -> dict[str, str]:
    """R@1 that is left beside the cost, and over ε, by the name of the file."""
    parts, costs = stored["parts"], stored["costs"]
    clean = left(parts, "clean") or 0.0
    chance = next(part["guessing"]["r1"] for part in parts.values() if "guessing" in part)
    scores = {name: score for name in costs if (score := left(parts, name)) is not None}
    shares, _ = powers([chance, clean, *scores.values()], base=chance)
    r1 = Scale("R@1 left, from guessing on", shares, [_share(share) for share in shares], origin=chance)
    ticks, names = powers(list(costs.values()))
    cpu = Scale("CPU ms a picture", ticks, names, origin=ticks[0])
    groups = [Group("clean pairs", [[Bar(clean, _share(clean), 4)], [Bar(None, "–")]])]
    for name in sorted(scores, key=lambda name: scores[name], reverse=True):
        cost = Bar(costs[name], f"{costs[name]:.3g}", 2)
        groups.append(Group(name, [[Bar(scores[name], _share(scores[name]))], [cost]]))
    own = stored["setting"]["settings"]["eps"]
    curves = [Line(name, sorted(_by_eps(parts, name, own)), kind) for kind, name in enumerate(reversed(LINES))]
    eps, steps = powers([x for line in curves for x, _ in line.points])
    ends = (eps[0], eps[-1])
    return {
        f"{task}-cost.svg": bars(
            "R@1 that is left of each method, and its CPU time a picture: words do most, and they are cheap.",
            [r1, cpu],
            groups,
        ),
        f"{task}-eps.svg": lines(
            "R@1 that is left over ε: noise alone leaves most of it at any ε, words with noise little.",
            Scale("ε, in 1/255", eps, steps),
            Scale("R@1 of the victim's best epoch", shares, [_share(share) for share in shares]),
            [
                *curves,
                Line("clean pairs", [(x, clean) for x in ends], 4, dashed=True),
                Line("guessing", [(x, chance) for x in ends], 3, dashed=True),
            ],
        ),
    }


def _share(value: float) -> str:
    return f"{value:.2g}".replace("0.", ".", 1)


def _by_eps(parts: dict[str, Any], method: str, own: int) -> Iterable[tuple[int, float]]:
    for name in dict.fromkeys(split(key)[0] for key in parts):
        plain, _, eps = name.partition(", eps ")
        value = left(parts, name)
        if plain == method and value is not None:
            yield int(eps or own), value
