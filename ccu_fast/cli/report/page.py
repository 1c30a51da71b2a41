"""report.html: one file with everything in it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from ccu_fast.cli.report import figures
from ccu_fast.cli.report.tables import Table, protect_table, unlearn_table
from ccu_fast.files import write_whole

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; }
caption { text-align: left; color: #555; padding-bottom: .4rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #eee; text-align: right; white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } tr.ours td { background: #fff6e5; font-weight: 600; }
img { max-width: 100%; } .pairs { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 15rem; font-size: 13px; } figure img { width: 100%; image-rendering: pixelated; }
pre { max-height: 20rem; overflow: auto; font-size: 12px; background: #f7f7f7; padding: .5rem; } .note { color: #555; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dd { margin: 0; }
"""

UNLEARN_TEXT = """Each digit image is cut in two: the left half is the <em>visual</em> modality, the right half the
<em>other</em>. A two-tower model is trained on both; then the visual knowledge of a forget set is taken out. Gold is a
model trained again from the start with the visual half of the forget set hidden: the nearer to gold, the better. The
CCU losses are this project's definition (the paper, arXiv 2509.23895, publishes no formulas we could follow)."""

PROTECT_TEXT = """Each image shows four digits, each caption reads them. Before publishing, MEM adds error-minimising
noise to the image and trigger words to the caption; EM adds the noise alone; random noise and words of the same size
are the control. A fresh victim is trained from scratch on
what is published and tested on clean strips: the lower its retrieval, the better the protection."""


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the page for the results of :func:`ccu_fast.cli.demo.run`, all of it or nothing."""
    body = [
        "<h1>ccu_fast demo</h1>",
        "<p>Unlearning and protection on scikit-learn's digits, computed by ccu_fast's own operations.</p>",
        facts({**results["versions"], "seeds": results["seeds"]}),
    ]
    if results["unlearn"]:
        body += ["<h2>Unlearning</h2>", f"<p>{UNLEARN_TEXT}</p>"]
        for scenario, by_seed in results["unlearn"].items():
            first = next(iter(by_seed.values()))
            body += [
                f"<h3>Forget {'a class' if scenario == 'class' else 'random instances'}</h3>",
                image(figures.unlearn_bars(scenario, by_seed), "accuracies by method"),
                table(unlearn_table(scenario, by_seed), ours="CCU"),
            ]
            picture = figures.unlearn_map(first)
            if picture is not None:
                body.append(image(picture, "map of visual embeddings before and after"))
        body.append(
            "<p class='note'>Membership AUC: how well confidence tells forgotten training items from unseen ones; "
            "compare it with gold's, 0.5 is no signal. Seconds are of this run.</p>"
        )
    if results["protect"]:
        body += ["<h2>Protection</h2>", f"<p>{PROTECT_TEXT}</p>"]
        body += [
            image(figures.victim_curves(results["protect"]), "victim curves"),
            table(protect_table(results["protect"]), ours="MEM (noise + trigger)"),
        ]
        for method, by_seed in results["protect"].items():
            measured = next(iter(by_seed.values()))["methods"][method]
            if measured["noise"]["eps_255"]:
                body += [
                    f"<h3>{escape(figures.PROTECT_LABELS[method])}</h3>",
                    f"<p class='note'>Largest change of a pixel {measured['noise']['eps_255']}/255, "
                    f"PSNR {measured['noise']['psnr_db']:.1f} dB. Left: original, middle: published.</p>",
                    image(figures.examples(measured), "clean, protected, noise"),
                ]
    write_page("ccu_fast demo", body, path)


def write_page(title: str, body: list[str], path: Path) -> None:
    """One HTML file, all of it or nothing."""
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    write_whole(path, page)


def facts(values: dict[str, Any]) -> str:
    """Names and values as a list."""
    return "<dl>" + "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items()) + "</dl>"


def image(png: bytes, description: str) -> str:
    """A picture within the page."""
    data = base64.b64encode(png).decode()
    return f"<p><img alt='{escape(description)}' src='data:image/png;base64,{data}'></p>"


def table(content: Table, *, ours: str) -> str:
    """The rows as HTML, one of them marked."""
    head = "".join(f"<th>{escape(c)}</th>" for c in content.columns)
    rows = "".join(
        f"<tr{' class=ours' if row[0] == ours else ''}>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>"
        for row in content.rows
    )
    return f"<div class='wide'><table><caption>{escape(content.caption)}</caption><tr>{head}</tr>{rows}</table></div>"
