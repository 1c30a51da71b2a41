"""The pages that commands write: read without a network, on a phone, in the dark, and by a screen reader."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccu_fast.cli.report import figures, findings, page
from ccu_fast.cli.report.tables import PROTECT_LABELS
from ccu_fast.mem.verification.shown import Shown
from tests.support.html_page import Page, contrast, faults

PART = {"forget_train": 0.5, "forget_test": 0.5, "retain_train": 0.9, "retain_test": 0.9}
EPOCH = {f"{side}_{name}": 0.5 for side in ("i2t", "t2i") for name in ("r1", "r5", "r10", "medr")} | {"epoch": 2}
TEMPLATE = (Path(page.__file__).parent / "page.html").read_text()


def audit(label: str, gap: float) -> dict[str, Any]:
    """The figures of a model that is off by some points in what is forgotten."""
    moved = {**PART, "forget_train": 0.5 + gap / 100}
    metrics = {modality: moved for modality in ("visual", "other", "fused")}
    return {**metrics, "mia_auc": 0.5, "average_gap": gap, "label": label}


def of_seed(seed: int, gaps: dict[str, tuple[str, float]]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(60, 8))
    return {
        "setting": {
            "task": "digits-halves",
            "scenario": "class",
            "seed": seed,
            "forget_class": 3,
            "forget_items": 128,
            "retain_items": 1129,
            "test_items": 360,
            "ranked": False,
        },
        "metrics": {name: audit(label, gap + seed) for name, (label, gap) in gaps.items()},
        "cost": {name: {"seconds": 1.0, "cpu_seconds": 1.0, "ratio": 0.25} for name in gaps},
        "embeddings": {
            "labels": np.arange(60) % 6,
            "forgotten": np.arange(60) % 6 == 3,
            "before": points,
            "after": points + 1,
        },
    }


GAPS = {
    "original": ("before unlearning", 30.0),
    "gold_mask": ("retrained, visual hidden", 0.0),
    "gold_again": ("retrained, another seed", 0.9),
    **{f"other_{i}": (f"method <{i}>", 2.0 + i) for i in range(9)},
    "ccu": ("CCU", 1.25),
    "ccu_without_a": ("CCU without (a)", 3.0),
}


def protected(seed: int, name: str, recall: float) -> dict[str, Any]:
    strip = np.zeros((16, 64)).tolist()
    example = {"clean": strip, "protected": strip, "noise": strip, "caption": "five six", "published": "actor five six"}
    epoch = {**EPOCH, "i2t_r1": recall, "t2i_r1": recall}
    method = {
        "last": epoch,
        "best": epoch,
        "reading": {"digit": 0.5},
        "curve": [epoch, epoch],
        "train_loss": [2.0, 1.0],
        "noise": {"eps_255": 0 if name == "clean" else 8, "psnr_db": 32.6},
        "examples": [example],
    }
    guessing = {"r1": 0.002, "r10": 0.02}
    return {
        "methods": {name: method},
        "train": 64,
        "test": 16,
        "seed": seed,
        "guessing": guessing,
        "settings": {"eps": 8},
    }


def results(seeds: int) -> dict[str, Any]:
    """What the demo hands to its page."""
    recalls = dict(zip(PROTECT_LABELS, (0.92, 0.9, 0.88, 0.42), strict=True))
    return {
        "versions": {"ccu_fast": "1"},
        "seeds": seeds,
        "unlearn": {"class": {str(seed): of_seed(seed, GAPS) for seed in range(seeds)}},
        "protect": {n: {str(s): protected(s, n, r) for s in range(seeds)} for n, r in recalls.items()},
    }


@pytest.fixture(autouse=True)
def _no_tsne(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "embedding_map", lambda before, after, kind: [before[:, :2], after[:, :2]])


def written(folder: Path, write: Any, *arguments: Any) -> str:
    write(*arguments, folder / "page.html")
    return (folder / "page.html").read_text()


def test_a_demo_page_begins_with_the_gap(tmp_path: Path) -> None:
    html = written(tmp_path, page.write_report, results(1))
    assert faults(html) == []
    told = re.findall(r"<li>(.*)</li>", html[: html.index("<h2>")])
    assert told.pop(0) == (
        "Forgetting a class: by the visual half alone the model recognises 80.0 % of the forgotten items before, 51.2 "
        "% after CCU; retrained without them, 50.0 %. Of new items that stay: 90.0 %, 90.0 % and 90.0 %."
    )
    assert told[0].startswith(
        "Forgetting a class: CCU ends 1.25 points from retraining; before, the model was 30.00 away; "
        "retraining again from other weights differs by 0.90; the nearest of 9 other methods, method &lt;0&gt;, "
        "ends 2.00"
    )
    assert "for 42.0 % of 16 clean test pairs, trained on the clean data for 92.0 %" in told[1]
    assert told[2].startswith("One seed, so noisy") and "seed 0 alone (noisy): what moved" in html
    assert html.count("<svg") == 2 + 2 + 4  # maps, curves, what the curves' colours mean
    assert html.count("<img") == 3 * 3


def test_several_seeds_show_their_spread(tmp_path: Path) -> None:
    told = results(3)
    html = written(tmp_path, page.write_report, told)
    assert faults(html) == []
    assert "noisy" not in html and "seeds 0, 1, 2: what moved" in html
    chart = findings.gap_chart(told["unlearn"]["class"])
    assert chart is not None and next(bar.text for bar in chart.bars if bar.ours) == "2.25 ± 1.00"
    assert chart.band == pytest.approx(1.9)


def test_few_bars_in_order_with_ours_marked() -> None:
    chart = findings.gap_chart(results(1)["unlearn"]["class"])
    assert chart is not None and len(chart.bars) <= findings.NEAREST + 2
    values = [bar.value for bar in chart.bars]
    assert values == sorted(values) and chart.top == max(values)
    assert [bar.name for bar in chart.bars if bar.ours] == ["CCU"]
    assert f"of 9 other methods the {findings.NEAREST} nearest" in chart.says and "up to 0.90" in chart.says
    protection = findings.protection_chart(results(1)["protect"])
    assert [bar.text for bar in protection.bars] == ["42.0 %", "88.0 %", "90.0 %", "92.0 %"]


def test_without_a_retrained_model_no_gap_is_told() -> None:
    seed = of_seed(0, {name: gap for name, gap in GAPS.items() if not name.startswith("gold")})
    for metrics in seed["metrics"].values():
        del metrics["average_gap"]
    assert findings.gap_chart({"0": seed}) is None and findings.part_chart({"0": seed}) is None
    assert findings.gap_sentence("class", {"0": seed}) is None
    assert findings.forgotten_sentence("class", {"0": seed}) is None


def test_an_alarm_of_rank_is_told_as_it_is() -> None:
    """Nothing is said to be nearest that is not."""
    worse = {**GAPS, "ccu": ("CCU", 5.5)}
    said = findings.gap_sentence("class", {"0": of_seed(0, worse)})
    assert said is not None and "4 of 9 other methods end nearer, first method <0> with 2.00" in said


@pytest.mark.parametrize(("last", "told"), [(0.1, True), (0.2, True), (0.3, False)])
def test_victims_that_guess_are_no_sign_of_protection(last: float, told: bool) -> None:
    """With 25 pictures and guessing at .1 an R@1 of up to .22 may be chance. The best epoch is chosen: no witness."""
    run = {"last": {**EPOCH, "i2t_r1": last, "t2i_r1": 0.1}, "best": EPOCH}
    result = {
        "guessing": {key: 0.1 for key in EPOCH},
        "test": {"images": 25, "captions": 25},
        "datasets": {
            "clean": {"seeds": {"0": run}},
            "protected": {"seeds": {"0": {**run, "last": {**run["last"], "i2t_r1": 0.1}}}},
        },
    }
    assert (findings.nothing_learned(result) is not None) is told


def test_pages_of_unlearn_evaluate_and_verify_are_as_good(tmp_path: Path) -> None:
    run = {
        "sizes": {"items": 1},
        "cost": {},
        "provenance": {"weights_sha256": "0" * 64, "model": "m"},
        "rows": [("accuracy", 0.5, 0.25)],
        "verdict": {"kind": "passed", "text": "t"},
        "alarm": None,
        "losses": [2.0, 1.5, 1.0],
        "embeddings": of_seed(0, GAPS)["embeddings"],
    }
    html = written(tmp_path, page.write_run, run)
    assert faults(html) == [] and html.count("<svg") == 3
    assert "from 2 at the first to 1 at the last of 3 steps" in html
    assert "Not measured here: what a probe still finds below" in html
    victims = {"curve": [EPOCH, EPOCH], "train_loss": [2.0, 1.0], "last": EPOCH, "best": EPOCH}
    evaluated = {
        "model": {"width": 1},
        "recipe": {"epochs": 2},
        "guessing": {k: 0.1 for k in EPOCH},
        "samples": {},
        "test": {"images": 2, "captions": 2},
        "datasets": {f"$\\frac${i}<b>": {"seeds": {"0": victims}} for i in range(14)},
    }
    png = figures._png(np.zeros((4, 4)))
    evaluated["samples"] = {"clean": [{"png": png, "caption": "a"}]}
    html = written(tmp_path, page.write_evaluation, evaluated)
    assert faults(html) == [] and "<b>" not in html
    lines = re.findall(r'stroke="(#\w+)" stroke-width="3" stroke-dasharray="([^"]*)"', html)
    assert len(lines) == len(set(lines)) == 14
    shown = Shown(
        name="a.png",
        place="",
        ssim=0.5,
        largest=8,
        size=(4, 4),
        clean=png,
        protected=png,
        noise=png,
        before=["a"],
        after=["b"],
    )
    found = {"folder": "f", "original": "o", "passed": True, "checks": {}}
    assert faults(written(tmp_path, page.write_preview, found, [shown])) == []


@pytest.mark.parametrize("losses", [[0.126, 0.249, 0.377], [1e-3, 3e-3], list(np.linspace(2, 0.1, 15))])
def test_few_ticks_at_round_numbers(losses: list[float]) -> None:
    drawn = Page("<html lang=en>" + figures.loss_curve(losses).svg)
    ticks = [float(text.replace("−", "-")) for _, text in drawn.texts if re.fullmatch(r"[−\d.]+", text)]
    across = next(i for i in range(1, len(ticks)) if ticks[i] <= ticks[i - 1])  # the steps first, then the loss
    for axis in (ticks[:across], ticks[across:]):
        assert 2 <= len(axis) <= 7
        (step,) = {f"{b - a:.3g}" for a, b in pairwise(axis)}
        assert step.strip("0.") in {"1", "2", "5"}
    assert all(tick.is_integer() for tick in ticks[:across])


def test_the_drawings_take_the_colour_of_the_text() -> None:
    svg = figures.loss_curve([2.0, 1.0]).svg
    assert "currentColor" in svg and figures.INK not in svg and "<?xml" not in svg
    assert not re.search(r"fill: ?(#ffffff|white)", svg)


def test_contrast_is_aa_in_the_light_and_in_the_dark() -> None:
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in TEMPLATE.split("@media")[:2])
    assert light.keys() == dark.keys() and light["page"] != dark["page"]
    for colors in (light, {**light, **dark}):
        for text, on in (("ink", "page"), ("quiet", "page"), ("ink", "soft"), ("ink", "ours-soft")):
            assert contrast(colors[text], colors[on]) >= 4.5, (text, on)
        # What a graphic is told by needs less; a value is written on top of the band.
        for mark in ("ours", "bar", *figures.COLORS):
            assert contrast(colors.get(mark, mark), colors["page"]) >= 3, mark
        assert contrast(colors["ink"], colors["band"]) >= 4.5
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_the_checker_finds_what_is_wrong() -> None:
    bad = (
        "<html><head><style>p { font: 10px x; }</style></head><body><h1>a</h1><h3>b</h3><img src='http://x/y.png'>"
        "<table><tr><th>a</th></tr></table><p style='width: 300px'><b></p></body></html>"
    )
    told = "\n".join(faults(bad))
    for part in ("language", "img without alt", "h3 after h1", "network", "scope", "caption", "dark", "fixed width"):
        assert part in told, part
    assert "10 is smaller than 12 px" in told and "</p>" in told
