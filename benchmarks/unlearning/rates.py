"""Which share of the common learning rate each baseline gets: the one nearest to retraining on seeds of no table.

    python -m benchmarks.unlearning.rates     about 15 minutes on one core; writes rates.json beside this file

Every baseline takes the steps of CCU's budget at each of these shares of its learning rate, on digits-halves with seeds
that no table uses; where it can be told to keep the other modality it is. The registry has the best of these, and the
common rate for a method that at none of them comes nearer than the untouched model does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.console import say
from benchmarks.results import store
from ccu_fast.unlearn.audit import audit, average_gap
from ccu_fast.unlearn.baselines.registry import BASELINES, Baseline
from ccu_fast.unlearn.study.methods import TELLABLE
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, make_scenario
from ccu_fast.unlearn.study.train import trained

RATES = Path(__file__).parent / "rates.json"
TASK = TASKS["digits-halves"]
SEEDS = (100, 101, 102)
SHARES = (1.0, 0.5, 0.3, 0.1, 0.05, 0.03, 0.01)


def measure(work: Path) -> dict[str, Any]:
    """The average gap of every baseline at every share, mean over the seeds, by scenario."""
    rows = []
    for scenario in SCENARIOS:
        splits = {seed: make_scenario(TASK, scenario, seed) for seed in SEEDS}
        models = {
            seed: [trained(TASK, split, kind, seed, folder=work).model for kind in ("original", "gold_mask")]
            for seed, split in splits.items()
        }
        gold: dict[int, Any] = {seed: audit(models[seed][1], **split.judged) for seed, split in splits.items()}
        before = fmean(
            average_gap(audit(models[seed][0], **split.judged), gold[seed]) for seed, split in splits.items()
        )
        for name, baseline in BASELINES.items():
            if baseline.prepare is None:
                continue
            row: dict[str, Any] = {"scenario": scenario, "method": name, "told": name in TELLABLE, "gaps": {}}
            for share in SHARES:
                tried = replace(baseline, rates=(share, share))
                found = [_gap(tried, name, scenario, seed, splits[seed], models[seed][0], gold) for seed in SEEDS]
                row["gaps"][str(share)] = fmean(found)
            row |= {"before": before, "best": best(row["gaps"], before)}
            rows.append(row)
            say(f"{scenario}, {name}: {row['best']}")
    return {"task": TASK.name, "seeds": list(SEEDS), "budget": vars(TASK.ccu["class"].budget), "rows": rows}


def best(gaps: dict[str, float], before: float) -> float:
    """The share with the smallest gap; 1 where none is clearly below that of the untouched model."""
    share = min(gaps, key=gaps.__getitem__)
    return float(share) if gaps[share] < 0.95 * before else 1.0


def _gap(
    baseline: Baseline, name: str, scenario: str, seed: int, split: Any, original: Any, gold: dict[int, Any]
) -> float:
    told = float(name in TELLABLE)
    done = baseline.run(
        original, split.forget, split.retain, scenario, TASK.ccu[scenario].budget, keep_other=told, seed=seed
    )
    return average_gap(audit(done.model, **split.judged), gold[seed])


if __name__ == "__main__":
    torch.set_num_threads(1)
    store(RATES, measure(Path("runs/unlearning/models")), depth=2)
