"""The page of ``ccu-fast evaluate``."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from ccu_fast.cli.report import figures
from ccu_fast.cli.report.page import facts, image, table, write_page
from ccu_fast.cli.report.tables import evaluation_table

TEXT = """Models were trained from scratch on each dataset and let retrieve among clean test pairs after every epoch.
The best epoch is the protector's worst case: somebody who notices stops there. Lower is better protected; guessing is
the floor."""


def write_evaluation(result: dict[str, Any], path: Path) -> None:
    """Write the page for what :func:`ccu_fast.mem.job.victims.evaluate_datasets` returns, all of it or nothing."""
    body = [
        "<h1>What was learned</h1>",
        f"<p>{TEXT}</p>",
        facts({**result["model"], **{f"victim's {k}": v for k, v in result["recipe"].items()}}),
        table(evaluation_table(result), ours=""),
        image(figures.evaluation_curves(result), "retrieval and training loss by epoch"),
    ]
    for name, pairs in result["samples"].items():
        body.append(f"<h2>{escape(name)}</h2><div class='pairs'>")
        body += [
            f"<figure><img alt='' src='data:image/png;base64,{pair['png']}'><figcaption>{escape(pair['caption'])}"
            "</figcaption></figure>"
            for pair in pairs
        ]
        body.append("</div>")
    body.append(f"<h2>Figures</h2><pre>{escape(json.dumps(result['datasets'], indent=1))}</pre>")
    write_page("What was learned", body, path)
