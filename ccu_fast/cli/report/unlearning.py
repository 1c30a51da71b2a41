"""The pages of ``ccu-fast unlearn``: one run, or the comparison of all methods."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from ccu_fast.cli.report import figures
from ccu_fast.cli.report.page import UNLEARN_TEXT, facts, image, table, write_page
from ccu_fast.cli.report.tables import depth_table, unlearn_table
from ccu_fast.unlearn.study.tasks import TASKS

NOTE = """Average gap: mean absolute distance to gold over the accuracies of every head on forget, retain and unseen
items
and the membership AUC, in points. Membership AUC: how well confidence tells forgotten training items from unseen ones;
compare it with gold's, 0.5 is no signal."""


def write_comparison(results: dict[str, Any], path: Path) -> None:
    """Write the page for what :func:`ccu_fast.unlearn.study.compare.compare` returns, all of it or nothing."""
    body = ["<h1>Unlearning compared</h1>", f"<p>{UNLEARN_TEXT}</p>", facts(results["versions"])]
    for task, by_scenario in results["unlearn"].items():
        body += [f"<h2>{escape(task)}</h2>", f"<p>{escape(TASKS[task].describe)}.</p>"]
        for scenario, by_seed in by_scenario.items():
            body.append(f"<h3>Forget {'a class' if scenario == 'class' else 'random instances'}</h3>")
            body += [
                image(figures.unlearn_bars(scenario, by_seed), "accuracies by method"),
                table(unlearn_table(scenario, by_seed), ours="CCU"),
            ]
            depth = depth_table(scenario, by_seed)
            if depth is not None:
                body.append(table(depth, ours="CCU"))
            for picture, says in (
                (figures.ablation_bars(by_seed), "average gap without each component"),
                (figures.unlearn_map(next(iter(by_seed.values()))), "map of visual embeddings before and after"),
            ):
                if picture is not None:
                    body.append(image(picture, says))
    body.append(f"<p class='note'>{NOTE}</p>")
    write_page("Unlearning compared", body, path)


def write_run(result: dict[str, Any], path: Path) -> None:
    """Write the page of one run of ``ccu-fast unlearn`` on a user's own data, all of it or nothing."""
    body = [
        "<h1>Unlearned</h1>",
        "<p>The CCU losses are this project's definition; arXiv 2509.23895 publishes no formulas.</p>",
        facts({**result["sizes"], **result["cost"], "weights sha256": result["provenance"]["weights_sha256"]}),
        "<div class='wide'><table><caption>Before and after</caption><tr><th></th><th>before</th><th>after</th></tr>",
        *(
            f"<tr><td>{escape(name)}</td><td>{before:.3f}</td><td>{after:.3f}</td></tr>"
            for name, before, after in result["rows"]
        ),
        "</table></div>",
        image(figures.loss_curve(result["losses"]), "loss by step"),
    ]
    if result.get("embeddings"):
        picture = figures.unlearn_map({"embeddings": result["embeddings"]})
        if picture is not None:
            body.append(image(picture, "map of visual embeddings before and after"))
    body.append(f"<h2>Provenance</h2><pre>{escape(json.dumps(result['provenance'], indent=1))}</pre>")
    write_page("Unlearned", body, path)
