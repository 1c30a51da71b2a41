"""``python -m benchmarks.protection``: what victims learn from a task that was protected; TASK.json beside this file.

``--task digit-strips`` is embedded; ``--task pictograms --packages DIR`` reads the npm packages that
``ccu_fast.data.pictograms`` names. Every finished part (a method, a seed, and what its victim is or what was done to
the published pairs) is stored at once, and the command resumes after it. A file holds one setting only: a different one
is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks import environment, results
from ccu_fast.mem import Method, Recipe, Settings
from ccu_fast.mem.job.treatments import OF_CAPTIONS, OF_PICTURES
from ccu_fast.mem.study import STRANGERS, Task, digit_strips, pictograms, run_task

DEPTH = 2  # a line for a part
WITH_WORDS = tuple(f"{name}+jpeg" for name in OF_CAPTIONS[:1])
TREATMENTS = (*OF_PICTURES, *OF_CAPTIONS, *WITH_WORDS)


# As before words told of the look: words that captions have not, drawn at random and then searched for by HotFlip.
SEARCHED = "searched words"


@dataclass(frozen=True)
class Study:
    """The generator's settings for a task, the methods, and those of them that also meet other victims and treatments.

    A method followed by a comma and :data:`SEARCHED` has ``searched`` instead of ``settings``.
    """

    settings: Settings
    searched: Settings
    methods: tuple[str, ...]
    tried: tuple[str, ...]

    def of(self, name: str) -> tuple[str, Settings]:
        """The method and its settings."""
        method, comma, _ = name.partition(", ")
        return method, self.searched if comma else self.settings


_STRIPS = Settings(
    eps=16,
    step=2,
    rounds=10,
    surrogate_steps=64,
    restart=0,
    trigger_rounds=2,
    pgd_steps=6,
    shuffle=0.5,
    first="random",
    words="everyday",
)
_PICTOGRAMS = Settings(eps=8, trigger_rounds=0, trigger_words=8)
STUDIES = {
    "digit-strips": Study(
        replace(_STRIPS, first="look", trigger_rounds=0),
        _STRIPS,
        (
            "clean",
            "em",
            *(f"{name}, {SEARCHED}" for name in ("random-3", "random-12", "trigger-3", "mem-3", "mem-5", "mem-12")),
            *("trigger-3", "mem-3", "mem-5", "mem-12"),
        ),
        ("clean", "mem-5"),
    ),
    "pictograms": Study(
        _PICTOGRAMS,
        Settings(eps=8, first="random", words="everyday"),
        ("clean", "random-8", "em", "trigger-3", "trigger-8", "mem-3", "mem-8", f"mem-3, {SEARCHED}"),
        ("clean", "mem-8"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compute what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.protection", description=__doc__)
    parser.add_argument("--task", choices=STUDIES, default="digit-strips")
    parser.add_argument("--packages", type=Path, help="folder of the npm packages, for pictograms")
    parser.add_argument("--out", type=Path, help="default: TASK.json beside this file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="default: those of the task")
    parser.add_argument("--tried", nargs="*", help="methods that meet other victims and treatments, too")
    parser.add_argument("--victims", nargs="*", default=[*STRANGERS, *TREATMENTS], help="which victims and treatments")
    parser.add_argument("--show", action="store_true", help="print the table of what there is")
    arguments = parser.parse_args(argv)
    study = STUDIES[arguments.task]
    stored: dict[str, Any] = {
        "setting": _setting(study),
        "environment": {},
        "parts": {},
    }
    out = arguments.out or Path(__file__).parent / f"{arguments.task}.json"
    if out.exists():
        stored = json.loads(out.read_text())
        if _read(stored["setting"]) != (study.settings, study.searched, Recipe()):
            print(f"{out} holds another setting; name another --out", file=sys.stderr)
            return 2
    methods = arguments.methods or study.methods
    tried = study.tried if arguments.tried is None else arguments.tried
    for seed in [] if arguments.show else arguments.seeds:
        for method in methods:
            lacking = _lacking(stored["parts"], method, seed, arguments.victims if method in tried else ())
            for name, part in _parts(_task(arguments, seed), study, method, seed, lacking).items():
                machine = environment.describe(torch.device("cpu"))
                # That of the first part, and of those that another machine or commit has added.
                stored["environment"] = stored["environment"] or machine
                stored["parts"][name] = part if machine == stored["environment"] else {**part, "environment": machine}
            results.store(out, stored, DEPTH)
            print(f"{method}, seed {seed}", flush=True)
    print(table(stored["parts"]))
    return 0


def _setting(study: Study) -> dict[str, Any]:
    return {"settings": asdict(study.settings), "searched": asdict(study.searched), "recipe": asdict(Recipe())}


def _read(setting: dict[str, Any]) -> tuple[Settings, Settings, Recipe]:
    """What a file was made with; what has become a setting since has its default there."""
    return Settings(**setting["settings"]), Settings(**setting["searched"]), Recipe(**setting["recipe"])


def _task(arguments: argparse.Namespace, seed: int) -> Callable[[], Task]:
    if arguments.task == "digit-strips":
        return partial(digit_strips, seed)
    if arguments.packages is None:
        raise SystemExit("--packages: expected the folder of the npm packages, which pictograms are read from")
    return partial(pictograms, arguments.packages, seed)


def _lacking(parts: dict[str, Any], method: str, seed: int, victims: Sequence[str]) -> list[str]:
    """What is not stored of a method and a seed: "" for the victim that is like the surrogate, names of the others."""
    wordless = Method.parse(method.partition(", ")[0]).triggers == 0
    names = ["", *(v for v in victims if not (wordless and v.startswith(OF_CAPTIONS)))]
    return [name for name in names if _name(method, seed, name) not in parts]


def _name(method: str, seed: int, victim: str) -> str:
    return f"{method}/{seed}" + (f"/{victim}" if victim else "")


def _parts(make: Callable[[], Task], study: Study, method: str, seed: int, lacking: list[str]) -> dict[str, Any]:
    if not lacking:
        return {}
    started = time.perf_counter()
    plain, settings = study.of(method)
    value = run_task(
        make,
        seed,
        (plain,),
        settings=settings,
        transfer=[name for name in lacking if name in STRANGERS],
        treatments=[name for name in lacking if name and name not in STRANGERS],
    )
    measured = {k: v for k, v in value["methods"][plain].items() if k != "examples"}
    others = measured.pop("transfer") | measured.pop("robustness")
    seconds = {"seconds": time.perf_counter() - started}
    parts = {_name(method, seed, name): victim for name, victim in others.items()}
    if "" in lacking:
        parts[_name(method, seed, "")] = {"guessing": value["guessing"], **measured, **seconds}
    return parts


def table(parts: dict[str, Any]) -> str:
    """R@1 image→text / text→image, mean ± spread over the seeds that are there."""
    lines = ["victim trained on | seeds | best R@1 i→t | t→i | last R@1 i→t | t→i | best R@10 i→t | t→i"]
    rows: dict[str, list[dict[str, Any]]] = {}
    order = list(dict.fromkeys(name.split("/")[0] for name in parts))
    for name, part in sorted(parts.items(), key=lambda item: order.index(item[0].split("/")[0])):
        method, _, *victim = name.split("/")
        rows.setdefault(", ".join([method, *victim]), []).append(part)
    for label, values in rows.items():
        keys = [("best", "i2t_r1"), ("best", "t2i_r1"), ("last", "i2t_r1"), ("last", "t2i_r1")]
        keys += [("best", "i2t_r10"), ("best", "t2i_r10")]
        cells = [_spread([v[when][key] for v in values]) for when, key in keys]
        lines.append(" | ".join([label, str(len(values)), *cells]))
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
