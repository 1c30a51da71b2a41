"""The HTML pages, filled from ``page.html``: one file with everything in it, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ccu_fast.cli.report import figures, findings, tables
from ccu_fast.files import write_whole
from ccu_fast.mem.verification.shown import Shown
from ccu_fast.unlearn.card import HOW_TO_READ
from ccu_fast.unlearn.study.tasks import TASKS

# By what a retrained model has not seen.
OWN_INTROS = {
    None: "No retrained model was there to compare with: the verdict is against what can be expected without one, and "
    "no gaps are told.",
    "both": "The retrained model has seen nothing of the forget set. What the other modality knows of it is therefore "
    "compared with the original.",
    "visual": "The retrained model has seen the other halves of the forget set alone.",
}


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the page for the results of :func:`ccu_fast.cli.demo.run`."""
    _write(
        path,
        "ccu_fast demo",
        "Unlearning and protection on scikit-learn's digits, computed by ccu_fast's own operations.",
        {**results["versions"], "seeds": results["seeds"]},
        findings=findings.findings(results),
        tasks=_tasks({"digits-halves": results["unlearn"]} if results["unlearn"] else {}),
        protection=_protection(results["protect"]) if results["protect"] else None,
    )


def write_comparison(results: dict[str, Any], path: Path) -> None:
    """Write the page for what :func:`ccu_fast.unlearn.study.compare.compare` returns, or ``compare_own``."""
    intro = "All methods of unlearning, measured against retraining."
    told = _gaps_told(results["unlearn"])
    _write(path, "Unlearning compared", intro, results["versions"], findings=told, tasks=_tasks(results["unlearn"]))


def write_own_comparison(results: dict[str, Any], path: Path) -> None:
    """Write the page for what :func:`ccu_fast.unlearn.study.own.compare_own` returns."""
    (by_kind,) = results["unlearn"].values()
    (by_seed,) = by_kind.values()
    setting = next(iter(by_seed.values()))["setting"]
    intro = (
        "Methods of unlearning on the same model, data and budget. U is the forget set, R the retain set; test pairs "
        "are those that no method saw. "
    ) + OWN_INTROS[setting["hidden"]]
    _write(
        path,
        "Unlearning compared",
        intro,
        {**results["versions"], "model": results["provenance"]["model"], **setting["sizes"]},
        findings=_gaps_told(results["unlearn"]),
        tasks=_tasks(results["unlearn"]),
        own=True,
        left_out=tables.left_out_table(results["left_out"]),
        raw={"Provenance": json.dumps(results["provenance"], indent=1)},
    )


def write_run(result: dict[str, Any], path: Path) -> None:
    """Write the page of one run of ``ccu-fast unlearn`` on a user's own data."""
    alarm = result["alarm"]
    _write(
        path,
        f"Unlearned: {alarm['name']}" if alarm else "Unlearned",
        f"{alarm['text'] + ' ' if alarm else ''}{tables.told(result['verdict'])} The CCU losses are this project's "
        f"definition; arXiv 2509.23895 publishes no formulas. {HOW_TO_READ}",
        {**result["sizes"], **result["cost"], "weights sha256": result["provenance"]["weights_sha256"]},
        rows=tables.before_after_table(result["rows"]),
        by_text=tables.text_table(result),
        drawings_by_title={
            "Loss by step": [figures.loss_curve(result["losses"])] if result["losses"] else [],
            "Visual embeddings": figures.unlearn_map(result["embeddings"]),
        },
        raw={"Provenance": json.dumps(result["provenance"], indent=1)},
    )


def write_failure(alarm: dict[str, str], path: Path) -> None:
    """Write the page of a run of ``ccu-fast unlearn`` that ended without a model."""
    _write(path, f"Unlearned: {alarm['name']}", alarm["text"], {})


def write_evaluation(result: dict[str, Any], path: Path) -> None:
    """Write the page for what :func:`ccu_fast.mem.job.victims.evaluate_datasets` returns."""
    victims = {name: list(dataset["seeds"].values()) for name, dataset in result["datasets"].items()}
    _write(
        path,
        "What was learned",
        "Models trained from scratch on each dataset retrieve among clean test pairs after every epoch. The best epoch "
        "is the protector's worst case: somebody who notices stops there. Lower is better protected; guessing is the "
        "floor. R@1 is the share whose right partner comes first, medR the median place of the right partner; i→t asks "
        "with a picture for its caption, t→i with a caption for its picture.",
        {**result["model"], **{f"victim's {k}": v for k, v in result["recipe"].items()}},
        findings=[sentence for sentence in (findings.nothing_learned(result),) if sentence],
        rows=tables.evaluation_table(result),
        drawings_by_title={"Epoch by epoch": figures.victim_curves(victims)},
        samples=result["samples"],
        raw={"Figures": json.dumps(result["datasets"], indent=1)},
    )


def write_preview(found: dict[str, Any], shown: Sequence[Shown], path: Path) -> None:
    """Write the contact sheet for what :func:`ccu_fast.mem.verification.verify_and_show` returns."""
    checks = {name: check["told"] for name, check in found["checks"].items() if check["passed"] is not None}
    _write(
        path,
        "What will be published",
        "Original, protected picture and ten times their difference (grey is none), with the captions of each: from "
        "the picture that is least similar to its original (SSIM) to the most similar one. Large pictures are "
        "thumbnails. This page holds originals: do not publish it.",
        {"dataset": found["folder"], "original": found["original"], **checks},
        contact=shown,
        raw={"Checks": json.dumps(found["checks"], indent=1)} if not found["passed"] else {},
    )


def _gaps_told(results: dict[str, Any]) -> list[str]:
    """A sentence for every task and what was forgotten, where there is a retrained model to tell the distance to."""
    told: list[str] = []
    for task, by_scenario in results.items():
        for scenario, by_seed in by_scenario.items():
            said = [find(scenario, by_seed) for find in (findings.forgotten_sentence, findings.gap_sentence)]
            found = [sentence for sentence in said if sentence is not None]
            told += [sentence if len(results) == 1 else f"{task}. {sentence}" for sentence in found]
            told += [findings.ONE_SEED] if found and len(by_seed) == 1 else []
    return list(dict.fromkeys(told))


def _tasks(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": task,
            "describe": TASKS[task].describe if task in TASKS else "",
            "scenarios": [
                {
                    "name": scenario,
                    "gaps": findings.gap_chart(by_seed),
                    "tables": tables.unlearn_tables(scenario, by_seed),
                    "depth": tables.depth_table(by_seed),
                    "parts": findings.part_chart(by_seed),
                    "map": figures.unlearn_map(next(iter(by_seed.values()))["embeddings"]),
                }
                for scenario, by_seed in by_scenario.items()
            ],
        }
        for task, by_scenario in results.items()
    ]


def _protection(results: dict[str, Any]) -> dict[str, Any]:
    victims = {
        tables.PROTECT_LABELS[method]: [value["methods"][method] for value in by_seed.values()]
        for method, by_seed in results.items()
    }
    return {
        "chart": findings.protection_chart(results),
        "curves": figures.victim_curves(victims),
        "table": tables.protect_table(results),
        "methods": [
            {"label": label, "noise": first["noise"], "examples": figures.examples(first)}
            for label, (first, *_) in victims.items()
            if first["noise"]["eps_255"]
        ],
    }


def _write(path: Path, title: str, intro: str, facts: dict[str, Any], **content: Any) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    absent: dict[str, Any] = {
        "tasks": [],
        "protection": None,
        "rows": None,
        "drawings_by_title": {},
        "samples": {},
        "raw": {},
    }
    absent |= {"findings": [], "contact": [], "own": False, "left_out": None, "by_text": None}
    page = environment.get_template("page.html")
    write_whole(path, page.render(title=title, intro=intro, facts=facts, **absent | content))
